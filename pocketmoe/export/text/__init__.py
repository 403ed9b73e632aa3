"""What decides the text, as transformers reads it: tokenizer, chat template, ends.

tokenizer.py        tokenizer, sandboxed chat template
tokenizer_check.py  two forms of one tokenizer are compared: on strings of every kind, all their added tokens, and made-
                    up answers
"""
