"""Many turns with forks, resets and stops; prints the peak, the budget and a digest of the tokens."""

import hashlib
import json
import sys

import pocketmoe
from pocketmoe.errors import ContextFull

with pocketmoe.load(sys.argv[1], memory=sys.argv[2]) as model:
    chat = model.chat("be brief", max_tokens=12, temperature=0)
    tokens: list[int] = []
    full = 0
    for turn in range(int(sys.argv[3])):
        asked = f"turn {turn}: what is in the forest, and who goes there?"
        try:
            tokens += chat.say(
                f"turn {turn}: what is in the forest, and who goes there?", max_tokens=6 + turn % 7
            ).tokens
            if turn % 5 == 4:
                tokens += chat.fork().say("in other words?").tokens
        except ContextFull:
            full += 1
            chat.reset()
        if turn % 7 == 6:
            with model.stream("once upon a time", max_tokens=20) as stream:
                next(stream)
    memory = model.memory
    digest = hashlib.sha256(str(tokens).encode()).hexdigest()
    sys.stdout.write(json.dumps({"peak": memory["peak"], "budget": memory["budget"], "full": full, "sha256": digest}))
