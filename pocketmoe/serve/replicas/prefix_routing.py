"""Which replica a request goes to: to the one that has computed the longest beginning of its text.

What a replica keeps of a text is its beginning, in whole chunks. So the text is cut into blocks here too, and each
block's hash takes in all blocks before it: the last known hash of a text says who has its longest beginning. Texts
cannot be told from hashes, which are keyed by a secret of this process.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

BLOCK_BYTES = 512  # of a text: about as many as the tokens of a chunk have
_MOST_BLOCKS = 1 << 16  # that are remembered, 100 bytes each
_BEFORE = ("model", "tools", "system", "instructions")  # what stands before a conversation in its prompt
_TEXTS = ("messages", "prompt", "input", "content", "tokens")


def text_of(request: Mapping[str, Any]) -> bytes:
    """What a prompt is made of, so that a request that goes on from another begins with the other's text."""
    before = [request.get(name) for name in _BEFORE]
    text: Any = next((request[name] for name in _TEXTS if request.get(name)), "")
    several = isinstance(text, list) and isinstance(text[0], str | list)
    told = json.dumps(text[0] if several else text, separators=(",", ":"))  # of several prompts the first
    return json.dumps(before, separators=(",", ":")).encode() + told.rstrip(']"').encode()


class PrefixRouting:
    """Remembers who has computed what. One thread's."""

    def __init__(self, replicas: int, parallel: int) -> None:
        """`parallel`: how many requests a replica answers at once."""
        self.loads = [0] * replicas  # requests that each has now
        self._begun = [0] * replicas  # texts that began with each: equally many, so that each keeps few prefixes
        self._parallel = parallel
        self._secret = secrets.token_bytes(16)
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, request: Mapping[str, Any], *, without: Sequence[int] = ()) -> int:
        """The replica for a request, which is noted to have its text from now on.

        The one that has the longest beginning, unless it is further behind with its work than computing anew would be:
        a whole round of answers more than the one with the least; that one has what nobody has. `without`: those that
        are lost.
        """
        hashes = self._hashes(text_of(request))
        able = [index for index in range(len(self.loads)) if index not in without] or [*range(len(self.loads))]
        least = min(able, key=lambda index: (self.loads[index], self._begun[index], index))
        known = next((self._known[each] for each in reversed(hashes) if each in self._known), None)
        keeps = (
            known in able and self.loads[known] - self.loads[least] <= self._parallel if known is not None else False
        )
        chosen = known if known is not None and keeps else least
        self._begun[chosen] += chosen != known
        for each in hashes:
            self._known[each] = chosen
            self._known.move_to_end(each)
        while len(self._known) > _MOST_BLOCKS:
            self._known.popitem(last=False)
        return chosen

    def forget(self, replica: int) -> None:
        """It has lost what it had computed."""
        self._known = OrderedDict((each, owner) for each, owner in self._known.items() if owner != replica)

    def _hashes(self, text: bytes) -> list[bytes]:
        """Of each whole block, with all before it."""
        found: list[bytes] = []
        last = self._secret
        for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
            last = hashlib.blake2b(text[start : start + BLOCK_BYTES], digest_size=16, key=last).digest()
            found.append(last)
        return found
