"""pocketmoe compare: our own measurement of endpoints, turned on our own server."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

URL, MODEL, _, _, BUNDLE = sys.argv[1:6]
SHORT = ["--prompt-tokens", "16", "--output-tokens", "8"]


def run(*arguments: object) -> None:
    command = ["pocketmoe", *map(str, arguments)]
    shown = {folder: "DIR", BUNDLE: MODEL, URL: "URL"}
    print("$", " ".join(shown.get(each, each) for each in command))
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)


with tempfile.TemporaryDirectory() as folder:
    run("profile", BUNDLE, "-o", folder, "--memory", "100%", *SHORT)
    for api in ("completions", "chat"):
        users = ["--concurrency", "1,2", "--requests", "2"]
        run("compare", folder, "-o", folder, "--endpoint", URL, "--model", MODEL, "--api", api, *users)
        endpoint = json.loads((Path(folder) / "endpoint.json").read_text())
        for level in endpoint["levels"]:
            counted = ", ".join(
                f"{level[name]} {name}" for name in ("users", "requests", "prompt_tokens", "output_tokens")
            )
            print(f"  {counted}, counted by the {endpoint['counted_by']}")
            assert level["output_tokens"] == 8
            assert level["tokens_per_s"] > 0
