"""Real clients against the real server: each prints a transcript, all of them become docs/CLIENTS.md.

    python scripts/clients/run_all.py [CLIENT ...]     by name, such as litellm; without one all, and the page is made

Clients live in a venv of their own, build/clients, which is made the first time. The server serves the reference model
in float32, with a chat template that does little but say what was said, so that lm-eval's scores can be compared with
transformers' on the same checkpoint. Every transcript is of greedy decoding: it comes out the same again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PAGE = REPOSITORY / "docs/CLIENTS.md"
VENV = REPOSITORY / "build/clients"
CHECKPOINT, TEXTS = REPOSITORY / "models/reference/checkpoint", REPOSITORY / "models/reference/heldout"
TEMPLATE = (  # says what was said, and tools where there are some
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endfor %}"
)
MODEL = "reference"
READY_S = 600

CLIENTS = {
    "litellm": "with_litellm.py",
    "langchain-openai": "with_langchain.py",
    "llm": "with_llm.py",
    "lm-eval": "with_lm_eval.py",
    "pocketmoe compare": "with_compare.py",
    "openai": "with_openai.py",
    "anthropic": "with_anthropic.py",
    "openai-agents": "with_openai_agents.py",
    "pydantic-ai": "with_pydantic_ai.py",
}
TOP = """# Clients

What real clients get from `pocketmoe serve`, as they print it. `python scripts/clients/run_all.py` makes this page: it
installs the clients into a venv of their own, serves the reference model, and fails where one of them does. OpenAI's
and Anthropic's own libraries are also tested with everything else (`tests/serve/`).

The model is the small one of this repository: what it says matters less than that each client gets the same.
"""


def make_venv() -> Path:
    """The interpreter of the clients' venv; what it lacks (torch, transformers) it has from ours."""
    python = VENV / "bin/python"
    wanted = HERE / "requirements.txt"
    stamp = VENV / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
        (ours,) = [each for each in sys.path if each.endswith("site-packages")][:1]
        (theirs,) = VENV.glob("lib/python*/site-packages")
        (theirs / "ours.pth").write_text(f"{ours}\n")
        stamp.write_text(wanted.read_text())
    return python


def make_bundle(folder: Path) -> tuple[Path, Path]:
    """The reference checkpoint with a chat template, and the bundle it becomes."""
    checkpoint, bundle = folder / "checkpoint", folder / MODEL
    shutil.copytree(CHECKPOINT, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    pocketmoe("export", checkpoint, "-o", bundle)
    return checkpoint, bundle


def pocketmoe(*arguments: object) -> None:
    """Run a command of ours."""
    subprocess.run([sys.executable, "-m", "pocketmoe", *map(str, arguments)], check=True, cwd=REPOSITORY)


@contextlib.contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pocketmoe", "serve", bundle, "--memory", "100%", "--port", str(port)]
    with open(bundle.parent / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=REPOSITORY, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(READY_S):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
                if json.load(response)["status"] == "ready":
                    break
            assert server.poll() is None, (bundle.parent / "server.log").read_text()
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(120)


def transcript(python: Path, name: str, script: str, arguments: list[str]) -> str:
    """What a client prints. Ends the program where one fails."""
    environment = {**os.environ, "NO_COLOR": "1", "OPENAI_API_KEY": "none", "PYTHONWARNINGS": "ignore"}
    interpreter = sys.executable if script == "with_compare.py" else str(python)
    done = subprocess.run(
        [interpreter, HERE / script, *arguments],
        capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout.rstrip()


def section(name: str, script: str, said: str) -> str:
    about = (HERE / script).read_text(encoding="utf-8").split('"""')[1].partition(": ")[2].strip()
    about = f"{about[0].upper()}{about[1:]} ([the script](../scripts/clients/{script}))"
    return f"\n## {name}\n\n{about}\n\n```text\n{said}\n```\n"


def main() -> None:
    wanted = sys.argv[1:] or [*CLIENTS]
    unknown = {*wanted} - {*CLIENTS}
    if unknown:
        sys.exit(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    python = make_venv()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = make_bundle(Path(folder))
        sections = []
        with served(bundle) as url:
            for name in wanted:
                said = transcript(python, name, CLIENTS[name], [url, MODEL, str(checkpoint), str(TEXTS), str(bundle)])
                print(f"== {name}\n{said}\n", flush=True)
                sections.append(section(name, CLIENTS[name], said))
    if len(wanted) == len(CLIENTS):
        PAGE.write_text(TOP + "".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
