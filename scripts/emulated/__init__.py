"""PocketMoE's runtime on processors that are not at hand, emulated by qemu-user: `make test-arm`.

__main__.py   the command: which machines, which cases; what was found goes into docs/platforms.json
userland.py   what it needs: the emulator, and an arm64 Python with the runtime's wheels
machines.py   the processors: how a command runs on each, and what each lacks
bundles.py    the bundles that are run: each format of a tiny model, and the reference model in int4
cases.py      what is tried on each, and how it is judged: by what this machine itself finds
guest.py      what runs on the processor itself, in one process
"""
