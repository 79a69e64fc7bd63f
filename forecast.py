"""When a batch will have ended: acceptance by row, and the time that is left.

`cost_model.py` has the speedup of one row at one acceptance. A batch at work is known better. Rows
differ: some keep all of their drafts and end early, others keep none and pay for every place of a
longer verification. A fixed batch waits for its slowest row, and rows that have ended read no KV.
So a `Record` counts what was kept by row, or kind of row, and by place, and `Ahead` has the time
to the end, as if all rounds were like the next one::

    rounds_b = tokens that row b still has to get / tokens that a round gives it

    seconds  = max over rows of rounds_b  *  (gamma * T_D + what a round takes without any row)
             + sum over rows of rounds_b  *  what a running row adds to a round

Where rows are refilled nobody waits, and the mean takes the place of the maximum.

A row's own rounds are few, so its rates lean on those of all rows. What is long past counts less:
texts change from one passage to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OPTIMISTIC = 0.95  # an acceptance that real text hardly exceeds
MEMORY = 6.0  # rounds of a row: what all its earlier ones count for, at most, when new ones come
PRIOR = 2.0  # rounds that what is believed of a row counts for, before its own are known


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Which drafts were kept, by row and by place: where four of a round were, the fifth mostly is.

    Instead of rows there can be kinds of rows, of which something is believed beforehand.
    """

    judged: Tensor = field(default_factory=lambda: torch.zeros(1, 0))  # [B, P], how often
    kept: Tensor = field(default_factory=lambda: torch.zeros(1, 0))  # [B, P]
    rounds: Tensor = field(default_factory=lambda: torch.zeros(1))  # [B], that they rest on
    believed: Tensor | None = None  # [B, >= P], acceptance; None: rows go like all of them

    @property
    def known(self) -> bool:
        """Whether it rests on anything."""
        return self.believed is not None or self.judged.numel() > 0

    def after(
        self,
        accepted: Tensor,  # [B, gamma + 1], how many rounds of a row kept 0, 1, .. drafts,
        drafted: Tensor,  # [B, gamma + 1], and how many had so many
    ) -> "Record":
        """With more rounds. A draft is judged if all before it were kept."""
        if not drafted[:, 1:].any():
            return self
        counts = torch.stack((accepted, drafted)).float()
        kept, had = counts.flip(2).cumsum(dim=2).flip(2)  # i or more
        room = had[:, 1:] / had[:, :-1].clamp_min(1)  # of those with i - 1 drafts, had an i-th
        judged, kept = torch.maximum(kept[:, :-1] * room, kept[:, 1:]), kept[:, 1:]
        share = self.rounds.clamp_max(MEMORY) / self.rounds.clamp_min(1)
        P = max(self.judged.shape[1], judged.shape[1])

        def joined(old: Tensor, new: Tensor) -> Tensor:  # [1 or B, <= P], [B, <= P] -> [B, P]
            old, new = (F.pad(t, (0, P - t.shape[1])) for t in (old, new))
            return share[:, None] * old + new

        places = joined(self.judged, judged), joined(self.kept, kept)
        return Record(*places, share * self.rounds + counts[0].sum(dim=1), self.believed)

    def tokens(self, gamma: int) -> Tensor:  # [B, gamma + 1]
        """Expected of a round of each row with 0, 1, .. gamma drafts, the target's own included.

        A row of which little is known goes as believed, or like all of them. There a place of
        which less than one round is known goes like the place before it.
        """
        n, believed = gamma, self.believed
        if believed is None:
            judged, kept = self.judged.sum(dim=0), self.kept.sum(dim=0)
            n = min(int((judged >= 1).sum()), gamma)  # places that are known are the first ones
            believed = (kept / judged)[None]
        room = 0, max(n - self.judged.shape[1], 0)
        judged, kept = (F.pad(t, room)[:, :n] for t in (self.judged, self.kept))
        rate = (kept + PRIOR * believed[:, :n]) / (judged + PRIOR)
        last = rate[:, -1:] if n else torch.full((len(rate), 1), OPTIMISTIC)
        rate = torch.cat((torch.ones_like(last), rate, last.expand(-1, gamma - n)), dim=1)
        return rate.cumprod(dim=1).cumsum(dim=1)


LIKELY = Record(torch.tensor([[4.0]]), torch.tensor([[3.0]]))  # three of four drafts are kept


class Ahead(NamedTuple):
    """What is still to be decoded, and what forwards take."""

    remaining: Tensor  # [B] float32, tokens; 0 in rows that have ended
    verify: dict[int, float]  # T_V in seconds by gamma, while all rows run; gamma 0 is T_T
    idle: dict[int, float]  # the same of rows that have ended
    refilled: bool = False  # whether rows that end are followed by others

    def seconds(self, gamma: int, rounds: Sequence[float], draft: float = 0.0) -> float:
        """Of so many rounds of each row, with `draft` seconds in each before its verification."""
        n, of_all = max(rounds), sum(rounds)
        if self.refilled:
            n = of_all / sum(more > 0 for more in rounds)
        row = (self.verify[gamma] - self.idle[gamma]) / len(rounds)
        return n * (draft + self.idle[gamma]) + of_all * row

    @property
    def plain(self) -> float:
        """Seconds of plain decoding."""
        return self.seconds(0, self.remaining.tolist())
