"""Which experts stay in memory: a pure policy over slot numbers, with no slot in sight, so that a trace can replay it.

All layers share the slots. An expert that is not resident takes the place of the resident with the lowest score:

    score = share of recent tokens that chose it (a moving average with that half-life in tokens; survives eviction)
          + recency_bonus     if the layer's last token chose it
          - distance_weight   times how far round the model its layer's next turn is, from 0 (the next layer) to 1 (this
            one)

Since the resident with the lowest score goes, not the one that was used longest ago, even a budget below one token's
experts has hits; one least-recently-used list over all layers would have none there. The constants were chosen by
replaying two real traces and seven fitted models (docs/LOG.md); the hits that Belady's optimum has beyond these need
knowledge of the future.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pocketmoe.bundle.store import ExpertId


@dataclass(frozen=True)
class Scoring:
    """The constants of an expert's score."""

    half_life: float = 24.0  # tokens; 16 to 64 differ by less than a point of hits
    recency_bonus: float = 0.25  # about what being chosen adds to the chance that the next token chooses it too
    distance_weight: float = 0.1


_SCORING = Scoring()


class ExpertCache:
    """Residents of one pool of equal slots."""

    def __init__(
        self, n_slots: int, experts: Mapping[int, int], width: int | None = None, scoring: Scoring = _SCORING
    ) -> None:
        """`experts`: how many experts of the pool each layer has. `n_slots` >= 1.

        `width`: the highest expert number of a layer plus one, where a layer has experts of other pools too.
        """
        self._most = sum(experts.values())
        self.n_slots = min(n_slots, self._most)
        self._scoring = scoring
        self._ema_step = 1 - 0.5 ** (1 / scoring.half_life)  # what one token adds to the share of those that it chose
        self._layers = sorted(experts)
        self._row = {layer: row for row, layer in enumerate(self._layers)}
        width = width or max(experts.values(), default=0)
        self._share = np.zeros((len(experts), width))  # of recent tokens
        self._score = np.zeros((len(experts), width))
        self._held = np.full((len(experts), width), np.inf)  # the score of residents, infinite elsewhere
        self._least = np.full(len(experts), np.inf)  # of each row of `_held`
        self._nearness = _nearness(len(experts), scoring.distance_weight)
        self._slot_of: dict[ExpertId, int] = {}
        self._free = list(range(self.n_slots))[::-1]

    @property
    def evicts(self) -> bool:
        """Whether there are fewer slots than experts; only then is it noted which are chosen."""
        return self.n_slots < self._most

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
        if row is None or not self.evicts:
            return  # a layer whose experts are all in other pools, or a pool that never evicts
        share, n_tokens = self._share[row], len(expert_ids)
        share *= 0.5 ** (n_tokens / self._scoring.half_life)
        if n_tokens == 1:
            share[expert_ids[0]] += self._ema_step
        else:
            fading = self._ema_step * 0.5 ** (np.arange(n_tokens - 1, -1, -1) / self._scoring.half_life)
            np.add.at(share, expert_ids, fading[:, None])
        score, held = self._score[row], self._held[row]
        score[:] = share
        score[expert_ids[-1]] += self._scoring.recency_bonus
        np.copyto(held, score, where=held < np.inf)
        self._least[row] = held.min()

    def expect(self, layer: int, shares: np.ndarray) -> None:
        """Say what share of a layer's tokens chooses each expert, float [experts], where that was not noted."""
        if layer in self._row:
            row = self._row[layer]
            self._share[row, : len(shares)] = self._score[row, : len(shares)] = shares
            held = self._held[row]
            np.copyto(held, self._score[row], where=held < np.inf)
            self._least[row] = held.min()

    def resize(self, n_slots: int) -> list[int]:
        """Have another number of slots, at least one and at most one for each expert; the slots that go.

        Those go first that nothing was ever in, then those of the residents with the lowest scores.
        """
        n_slots = min(max(1, n_slots), self._most)
        gone: list[int] = []
        for _ in range(self.n_slots - n_slots):
            if not self._free:
                victim = self._weakest(self._layers[-1], ())  # the first layer has its turn next
                assert victim is not None, "a slot that is not free holds an expert"
                self.forget(victim)
            gone.append(self._free.pop(0))
        if n_slots > self.n_slots:
            known = {*self._free, *self._slot_of.values()}
            new = [number for number in range(self._most) if number not in known][: n_slots - self.n_slots]
            self._free[:0] = new[::-1]
        self.n_slots = n_slots
        return gone

    def place(self, expert: ExpertId, keep: Collection[ExpertId]) -> int | None:
        """Take a slot for an expert that has none, evicting another but never one of `keep`; None if all are kept.

        Once it is None, it is None for every expert of the pool until `keep` has shrunk.
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
        self._hold(expert, self._score[self._row[expert.layer], expert.expert])
        return slot

    def forget(self, expert: ExpertId) -> None:
        """Undo `place`: what it promised could not be loaded."""
        self._free.append(self._slot_of.pop(expert))
        self._hold(expert, np.inf)

    def _weakest(self, layer: int, keep: Collection[ExpertId]) -> ExpertId | None:
        """The resident with the lowest score that is not in `keep`; layers after `layer` have their turn next."""
        nearness = self._nearness[self._row[layer]]
        masked: list[tuple[int, np.ndarray]] = []  # rows as they were before kept experts were masked
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

    def _hold(self, expert: ExpertId, score: float) -> None:
        """Enter a resident with its score, or with infinity one that leaves."""
        row = self._row[expert.layer]
        self._held[row, expert.expert] = score
        self._least[row] = self._held[row].min()


def _nearness(n_layers: int, distance_weight: float) -> np.ndarray:
    """What layer distance adds to a score, at most 0: float [layer whose turn it is, layer of the resident]."""
    layers = np.arange(n_layers)
    turns = (layers[None, :] - layers[:, None] - 1) % max(1, n_layers)
    return -distance_weight * turns / max(1, n_layers - 1)
