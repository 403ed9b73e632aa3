"""The one budget, and memory that stays.

budget.py    the one budget object, memory in use
ceiling.py   a limit that the system itself holds, so that a graph which asks for more memory than the budget has does
             not get it
limits.py    what the system limits beside memory: open files, memory maps
mlock.py     memory that the system may not swap out
pressure.py  whether the system is short of memory, and what an elastic budget becomes then
"""
