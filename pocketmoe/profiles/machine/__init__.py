"""This machine: limits, speeds, energy, temperature.

bandwidth.py  how fast this machine reads its disk and memory
doctor.py     this machine, judged
energy.py     joules, where the machine tells
limit.py      a command under a memory limit that kills
load.py       how busy others keep the processors meanwhile
thermal.py    temperature and throttling, where the machine tells
"""
