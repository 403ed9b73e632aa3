"""llama.cpp's own server in this process until SIGTERM, for `serve_load.py --peer`; needs `pip install xllamacpp`.

    python benchmarks/llamacpp_server.py GGUF [--parallel 8] [--context 4096] [--no-repack]

Prints a line of JSON to stderr once it can be asked, as `pocketmoe serve` does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from peer import server_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="of each text")
    parser.add_argument("--no-repack", action="store_true")
    args = parser.parse_args()
    params = server_params(args.gguf, args.context * args.parallel, repack=not args.no_repack)
    params.n_parallel = args.parallel
    params.port = 0
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    import xllamacpp  # once it is known that something is to be served

    server = xllamacpp.Server(params)
    print(
        json.dumps({"event": "ready", "url": server.listening_address, "pid": os.getpid()}), file=sys.stderr, flush=True
    )
    signal.sigwait({signal.SIGTERM})
    os._exit(0)  # its threads would be waited for


if __name__ == "__main__":
    main()
