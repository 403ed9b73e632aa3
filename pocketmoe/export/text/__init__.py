"""What decides the text, as transformers reads it: tokenizer, chat template, ends.

chat_template.py    the chat templates of a checkpoint: found as transformers finds them, tried, and written into a
                    bundle
generation.py       what generation_config.json says: where texts end, and how their authors sample
tokenizer.py        the tokenizer as transformers loads it, in one file, checked against it
tokenizer_check.py  two forms of one tokenizer are compared: on strings of every kind, all their added tokens, and made-
                    up answers
"""
