"""Which experts stay in memory: a pure policy over slot numbers, with no slot in sight, so that a trace can replay it.

All layers share the slots. An expert that is not resident takes the place of the resident of least worth:

    worth = share of recent tokens that chose it (what it counts halves every `half_life` tokens; survives eviction)
          + again      if the layer's last token chose it (a recency bonus)
          - patience   times how far round the model its layer's next turn is, from 0 (the next layer) to 1 (this one)
            (a layer-distance weight)

Since the resident of least worth goes, not the one that was used longest ago, a budget below one token's experts still
hits, where one least-recently-used list over all layers hits nothing at all. The constants were chosen by replaying two
real traces and seven fitted models (docs/LOG.md); the gap to Belady's optimum that is left is knowledge of the future.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pocketmoe.bundle.store import ExpertId


@dataclass(frozen=True)
class Worth:
    """What an expert's place in memory is judged by."""

    half_life: float = 24.0  # tokens; 16 to 64 differ by less than a point of hits
    again: float = 0.25  # about what being chosen adds to the chance that the next token chooses it too
    patience: float = 0.1


_WORTH = Worth()


class ExpertCache:
    """Residents of one pool of equal slots."""

    def __init__(
        self, n_slots: int, experts: Mapping[int, int], n_scores: int | None = None, worth: Worth = _WORTH
    ) -> None:
        """`experts`: how many experts of the pool each layer has. `n_slots` >= 1.

        `n_scores`: the highest expert number of a layer plus one, where a layer has experts of other pools too.
        """
        self.n_slots = min(n_slots, sum(experts.values()))
        self._evicts = self.n_slots < sum(experts.values())
        self._judged = worth
        self._news = 1 - 0.5 ** (1 / worth.half_life)  # what one token adds to the share of those that it chose
        self._layers = sorted(experts)
        self._row = {layer: row for row, layer in enumerate(self._layers)}
        width = n_scores or max(experts.values(), default=0)
        self._share = np.zeros((len(experts), width))  # of recent tokens
        self._worth = np.zeros((len(experts), width))
        self._held = np.full((len(experts), width), np.inf)  # the worth of residents
        self._least = np.full(len(experts), np.inf)  # of each row of `_held`
        self._nearness = _nearness(len(experts), worth.patience)
        self._slot_of: dict[ExpertId, int] = {}
        self._free = list(range(self.n_slots))[::-1]

    def slot_of(self, expert: ExpertId) -> int | None:
        """The slot that holds the expert, or None."""
        return self._slot_of.get(expert)

    def residents(self, layer: int) -> np.ndarray:
        """Which of a layer's experts have a slot, bool [experts]; those of other pools have none."""
        row = self._row.get(layer)
        return np.zeros(self._held.shape[1], bool) if row is None else self._held[row] < np.inf

    def count(self, layer: int, expert_ids: np.ndarray) -> None:
        """Note that a layer's router chose `expert_ids`, int [tokens, top_k]; earlier choices fade."""
        row = self._row.get(layer)
        if row is None or not self._evicts:
            return  # a layer whose experts are all in other pools, or nothing that its worth could decide
        share, n_tokens = self._share[row], len(expert_ids)
        share *= 0.5 ** (n_tokens / self._judged.half_life)
        if n_tokens == 1:
            share[expert_ids[0]] += self._news
        else:
            fading = self._news * 0.5 ** (np.arange(n_tokens - 1, -1, -1) / self._judged.half_life)
            np.add.at(share, expert_ids, fading[:, None])
        worth, held = self._worth[row], self._held[row]
        worth[:] = share
        worth[expert_ids[-1]] += self._judged.again
        np.copyto(held, worth, where=held < np.inf)
        self._least[row] = held.min()

    def expect(self, layer: int, shares: np.ndarray) -> None:
        """Say, before anything is placed, what share of a layer's tokens chooses each expert, float [experts]."""
        if layer in self._row:
            row = self._row[layer]
            self._share[row, : len(shares)] = self._worth[row, : len(shares)] = shares

    def place(self, expert: ExpertId, keep: Collection[ExpertId]) -> int | None:
        """Take a slot for an expert that has none, evicting another but never one of `keep`; None if all are kept.

        None holds for every expert of the pool until `keep` shrinks.
        """
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._weakest(expert.layer, keep)
            if victim is None:
                return None
            slot = self._slot_of.pop(victim)
            self._hold(victim, np.inf)
        self._slot_of[expert] = slot
        self._hold(expert, self._worth[self._row[expert.layer], expert.expert])
        return slot

    def forget(self, expert: ExpertId) -> None:
        """Undo `place`: what it promised could not be loaded."""
        self._free.append(self._slot_of.pop(expert))
        self._hold(expert, np.inf)

    def _weakest(self, layer: int, keep: Collection[ExpertId]) -> ExpertId | None:
        """The resident of least worth that is not in `keep`; layers after `layer` have their turn next."""
        nearness = self._nearness[self._row[layer]]
        masked: list[tuple[int, np.ndarray]] = []  # rows out of which what is kept was taken, as they were
        victim = None
        while victim is None:
            row = int((self._least + nearness).argmin())
            if self._least[row] == np.inf:
                break
            expert = ExpertId(self._layers[row], int(self._held[row].argmin()))
            if expert not in keep:
                victim = expert
            else:  # rare but for the layer at hand, so that most calls look at one row only
                masked.append((row, self._held[row].copy()))
                self._held[row, [kept.expert for kept in keep if kept.layer == expert.layer]] = np.inf
                self._least[row] = self._held[row].min()
        for row, held in masked:
            self._held[row] = held
            self._least[row] = held.min()
        return victim

    def _hold(self, expert: ExpertId, worth: float) -> None:
        """Enter a resident with its worth, or with infinity one that leaves."""
        row = self._row[expert.layer]
        self._held[row, expert.expert] = worth
        self._least[row] = self._held[row].min()


def _nearness(n_layers: int, patience: float) -> np.ndarray:
    """What a resident of each layer gains, [layer whose turn it is, layer of the resident]."""
    layers = np.arange(n_layers)
    turns = (layers[None, :] - layers[:, None] - 1) % max(1, n_layers)
    return -patience * turns / max(1, n_layers - 1)
