"""The commands of `pocketmoe`. A file is a command: it parses, calls, prints.

chat.py             chat: a conversation in the terminal
compare.py          compare: a profile beside rented GPUs and hosted APIs
doctor.py           doctor: this machine
evaluate.py         eval: what a bundle is worth, and an exit of its own where a gate fails
export.py           export: a checkpoint to a bundle
export_portable.py  export-portable: a bundle to one ONNX model
inspect.py          inspect: what is in a bundle
measure.py          measure, which is hidden: what each process of `profile` does
pack.py             pack: experts as this CPU wants them, beside the others or in their place
packed.py           packed: experts that are packed outside of their bundles, and their removal
plan.py             plan: what would fit
prefix_cache.py     prefix-cache: what a prefix cache on disk holds, and its removal
profile.py          profile: a bundle measured on this machine
pull.py             pull: a bundle from the hub
push.py             push: a bundle to the hub
quantize.py         quantize: a bundle to a smaller one
replay.py           replay: a recorded run at other budgets
run.py              run: text from a bundle
serve.py            serve: bundles over HTTP
verify.py           verify: every hash of a bundle
"""
