"""Conversations to prompts, by strangers' templates within counted limits.

costs.py     what each filter, test and method of a chat template costs, known before it runs
meter.py     what a chat template may use: steps and bytes are counted, so that a hostile one ends soon and in little
             memory
sandbox.py   the environment in which chat templates run: the names of transformers', and a meter at everything that
             costs
template.py  a conversation as the text that a model was trained on: its own chat template, by the rules of transformers
"""
