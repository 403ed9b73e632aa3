"""A bundle run at several budgets on this machine, into a profile.

curve.py         a recorded routing to counts and a cache curve, which tell nothing of the text
expert_costs.py  what reading one expert costs here, by the runtime's own readers
measure.py       every budget in a process of its own, into a profile that can be resumed
worker.py        what such a process does: a survey, or the workload once
"""
