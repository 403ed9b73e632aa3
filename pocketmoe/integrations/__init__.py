"""PocketMoE within other people's libraries. Nothing of the package imports it: who wants one of them does.

optimum.py        PocketMoEForCausalLM: a bundle where transformers and optimum want a model
configuration.py  what transformers wants to know of a bundle's model
loading.py        where `from_pretrained` finds a bundle, or makes one
texts.py          the rows of a batch as texts of an engine, and what transformers takes for their cache
wrong_use.py      what of transformers' loading and generation is refused, by name
optimum_cli.py    the subcommands of optimum-cli
"""
