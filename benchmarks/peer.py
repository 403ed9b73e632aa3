"""Feeds given tokens to llama.cpp in this process and prints the figures as one line of JSON; started by benchmarks.

    python benchmarks/peer.py GGUF [--no-repack] [--caches q8_0] [--prompt N] [--tokens N] [--routing realistic] ...

Needs `pip install xllamacpp`.
Each request is the text so far and one more token, whose computing is all that is left to do: the cache of the text
before is reused. Its own timings count, not ours, so that what a request costs beyond the model is not held against
it. Its options for experts do not help here: its expert cache is of GPUs, and lazy loading is for tensors that no
architecture of ours marks (tried: 0.3 tokens/s with and without).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

from machine import THREADS
from routing import given_tokens

if TYPE_CHECKING:
    import xllamacpp


def server_params(gguf: Path, capacity: int, repack: bool, caches: str = "f16") -> xllamacpp.CommonParams:
    """Its best settings for this machine. `capacity`: tokens of all texts together; `caches`: f16 or q8_0."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = -(-capacity // 256) * 256
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.warmup, params.n_parallel, params.verbosity, params.fit_params = False, 1, -1, False
    params.cache_ram_mib = 0  # no second copy of the text's cache
    params.no_extra_bufts = not repack
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{caches.upper()}")
    return params


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split(":")[1] for line in lines if line.startswith("read_bytes")))


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--caches", choices=("f16", "q8_0"), default="f16")
    parser.add_argument("--first", type=int, help="tokens of the first prompt; as many as of the next where not given")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(  # under tight limits it reads gigabytes for each token
        "--seconds", type=float, default=30, help="of decoding, after which its speed is known"
    )
    parser.add_argument("--routing", choices=("uniform", "realistic"), default="uniform")
    args = parser.parse_args()
    import xllamacpp  # once it is known that something is to be run

    n_first = args.first or args.prompt
    tokens = given_tokens(args.routing, n_first + args.prompt + args.tokens)
    began = time.perf_counter()
    server = xllamacpp.Server(
        server_params(args.gguf, max(n_first, args.prompt + args.tokens) + 1, not args.no_repack, args.caches)
    )
    ready = time.perf_counter()

    def feed(text: list[int], new: int) -> float:
        """Seconds that the model took for the last `new` tokens of a text."""
        request = {
            "prompt": text,
            "n_predict": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "temperature": 0.0,
        }
        answer = server.handle_completions(request)
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        assert timings["prompt_n"] == new, f"{timings['prompt_n']} tokens were computed instead of {new}"
        return timings["prompt_ms"] / 1e3

    before = read_bytes()
    prefill_s = feed(tokens[:n_first], n_first)
    answered, prompt_read = time.perf_counter(), read_bytes()
    text = tokens[n_first:]
    next_s = feed(text[: args.prompt], args.prompt)
    first, faulted, read, model_s, done = time.perf_counter(), faults(), read_bytes(), 0.0, 0
    while done < args.tokens and (done < 2 or time.perf_counter() - first < args.seconds):
        done += 1
        model_s += feed(text[: args.prompt + done], 1)
    figures = {
        "tokens": done,
        "tokens_per_s": done / model_s,
        "tokens_per_s_with_requests": done / (time.perf_counter() - first),
        "prompt": args.prompt,
        "prefill_tokens_per_s": n_first / prefill_s,
        "prefill_read_bytes": prompt_read - before,
        "next_prefill_tokens_per_s": args.prompt / next_s,
        "ttft_s": answered - ready,
        "start_s": ready - began,
        "read_bytes_per_token": (read_bytes() - read) / done,
        "major_faults_per_token": (faults() - faulted) / done,
        "repack": not args.no_repack,
    }
    print(json.dumps(figures), flush=True)
    os._exit(0)  # the server's threads do not end by themselves


if __name__ == "__main__":
    main()
