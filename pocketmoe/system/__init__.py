"""What one operating system has and another lacks: each call with what is done where it is missing, chosen as it runs.

c_library.py   functions of the C library by name, where it has them
cpus.py        which CPUs and threads there are; what runs where
files.py       reads past the page cache, room set aside and given back, directories exchanged and synced
limits.py      what the system lets a process take
locks.py       one process at a time
memory.py      what this process takes and the machine has, and how exactly that is known; the heap's leftovers

Everything was run on Linux. What stands in for it elsewhere was run on Linux with the call taken away
(tests/system/); on macOS and Windows themselves nobody has run it (docs/PLATFORMS.md).
"""
