"""This machine: limits, speeds, energy, temperature.

bandwidth.py  how fast this machine reads its disk and memory
computing.py  how fast the runtime computes here: its own kernels, slots and helpers
doctor.py     this machine, judged
energy.py     joules, where the machine tells
layer_costs.py  what a layer takes whatever its size, by a small bundle (`sample.zip`)
limit.py      a command under a memory limit that kills
load.py       what others take of processors and disk meanwhile; measuring again when it was much
made_up.py    made-up weights in graphs for the kernels
pace.py       how fast the machine is at this moment
thermal.py    temperature and throttling, where the machine tells
"""
