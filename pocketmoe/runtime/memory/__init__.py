"""The one budget, and memory that stays.

budget.py  the one budget object, memory in use
mlock.py   memory that the system may not swap out
"""
