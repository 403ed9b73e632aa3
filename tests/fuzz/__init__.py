"""Fuzzing: what a stranger's file or a slip of the keyboard does to the command line.

    python -m tests.fuzz --target bundles --cases 200 --seed 7      a campaign
    python -m tests.fuzz --replay bundles:7:31                      one case again, kept on disk

A target (`bundles`, `checkpoints`, `inputs`, `configs`, `tokenizers`) makes one case from a seed and a number alone. A
case runs in a child that a process with all imports done has forked (`zygote`), beside files that it must not touch
(`place`), and is judged by rules that hold for every command (`judge`).
"""
