"""One ONNX graph of a whole model, its experts as a custom operator.

adapters.py          the routed experts of a model's modules: where each tensor of each expert is
attention.py         sinks and latent attention in a form that keeps its caches in place
capture.py           one ONNX graph for prompt and decode alike
custom_op.py         the `pocketmoe::experts` operator and where it takes the experts' place
equivalence.py       one expert by graph against the module itself, before anything is stored
expert_form.py       what a class of MoE modules has for experts; `register` for classes of your own
exporter_patches.py  additions to the exporter's own table of patches
monkeypatches.py     a model's functions and methods replaced by equivalent ones while it is captured
recurrence.py        linear attention and state spaces token by token, as one Scan
registered.py        such forms for the MoE modules of transformers that its interface leaves out
"""
