"""The one budget, and memory that stays.

budget.py  the one budget object, memory in use
limits.py  what the system limits beside memory: open files, memory maps
mlock.py   memory that the system may not swap out
"""
