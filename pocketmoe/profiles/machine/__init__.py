"""This machine: limits, speeds, energy, temperature.

bandwidth.py  how fast this machine reads its disk and memory
doctor.py     this machine, judged
energy.py     joules, where the machine tells
limit.py      a command under a memory limit that kills
load.py       what others take of processors and disk meanwhile; measuring again when it was much
thermal.py    temperature and throttling, where the machine tells
"""
