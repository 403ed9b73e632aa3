"""Where rooms meet that know nothing of each other: what the commands, and Python users, call with a frozen request.

evaluate.py  a bundle by texts, pairs and tasks, perhaps against a reference; judged by gates, and filed
export.py    a checkpoint that is found, refused at once where it can be, converted and, if wanted, packed
quantize.py  what quantize goes by: a text through a bundle, and what that showed, kept until it ends
"""
