"""llm: models on the command line, with a log that it keeps itself."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, MODEL = sys.argv[1:3]
SETTINGS = f"""
- model_id: pocket
  model_name: {MODEL}
  api_base: {URL}/v1
- model_id: pocket-text
  model_name: {MODEL}
  api_base: {URL}/v1
  completion: true
"""


def llm(*arguments: str) -> str:
    """Run `llm` and show it as somebody would see it."""
    print("$ llm", " ".join(f"'{each}'" if " " in each else each for each in arguments))
    done = subprocess.run(
        ["llm", *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout.rstrip())
    return done.stdout


with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "extra-openai-models.yaml").write_text(SETTINGS)
    programs = Path(sys.executable).parent
    ENVIRONMENT = {**os.environ, "LLM_USER_PATH": folder, "PATH": f"{programs}:{os.environ['PATH']}"}
    settings = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    first = llm("-m", "pocket", *settings, "To create an index, use the")
    assert llm("-m", "pocket", "--no-stream", *settings, "To create an index, use the") == first
    llm("-m", "pocket-text", *settings, "To create an index, use the")
    llm("-c", *settings, " and to drop it")
