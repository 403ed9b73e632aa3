"""The commands of `pocketmoe`, by what they are for: each parses, calls, prints.

chat.py      chat
compare.py   compare
evaluate.py  eval, and its exit when a gate fails
export.py    export, export-portable: parse, call, print
inspect.py   inspect, verify, doctor
plan.py      plan
profile.py   profile
quantize.py  quantize
run.py       run, replay
"""
