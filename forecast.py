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
texts change from one passage to the next. And the clock is corrected by what rounds really take
(`Clock`): a machine that others use has slow minutes and fast ones.

All of this happens between two rounds, with a few hundred numbers. In plain Python, for there a
tensor operation costs more than the numbers in it.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, chain, repeat, zip_longest
from operator import mul
from typing import NamedTuple

OPTIMISTIC = 0.95  # an acceptance that real text hardly exceeds
MEMORY = 6.0  # rounds of a row: what all its earlier ones count for, at most, when new ones come
PRIOR = 2.0  # rounds that what is believed of a row counts for, before its own are known

NOISE = 0.1  # deviation of the logarithm of a round's seconds,
SLIP = 0.15  # and of what a calibration has wrong
OUTLIER = 0.5  # a round that is off by more was interrupted
KEEP = 0.99  # of what is known of a machine, from one round to the next

Table = Sequence[Sequence[float]]  # [B, n]


def at_least(histogram: Sequence[float]) -> list[float]:
    """How many had 0, 1, .. or more, by how many had exactly so many."""
    return [*accumulate(reversed(histogram))][::-1]


def together(rows: Table, groups: Sequence[Sequence[int]]) -> list[list[float]]:
    """The sums of rows, [n] each, by group."""
    none = [0.0] * len(rows[0])
    return [[*map(sum, zip(none, *(rows[b] for b in group), strict=True))] for group in groups]


class Row(NamedTuple):
    """Which drafts of a row were kept, by place. Places that were never reached may be missing."""

    judged: Sequence[float] = ()  # [P], how often
    kept: Sequence[float] = ()  # [P]
    rounds: float = 0.0  # that they rest on

    def after(self, accepted: Sequence[float], drafted: Sequence[float]) -> "Row":
        """With more rounds: [gamma + 1], how many kept, and had, 0, 1, .. drafts."""
        if not any(accepted):
            return self
        kept, had = at_least(accepted), at_least(drafted)
        judged = [
            max(before * room / max(of, 1), here)  # of those with i - 1 drafts, had an i-th
            for before, here, of, room in zip(kept, kept[1:], had, had[1:], strict=False)
        ]
        share = min(self.rounds, MEMORY) / max(self.rounds, 1)

        def joined(old: Sequence[float], new: list[float]) -> list[float]:
            return [share * a + b for a, b in zip_longest(old, new, fillvalue=0)]

        rounds = share * self.rounds + kept[0]
        return Row(joined(self.judged, judged), joined(self.kept, kept[1:]), rounds)

    def tokens(self, gamma: int, believed: Sequence[float]) -> list[float]:  # [gamma + 1], [<= g]
        """Expected of a round with 0, 1, .. gamma drafts, the target's own included.

        A place of which nothing is believed goes like the one before it.
        """
        own = (chain(places, repeat(0)) for places in (self.judged, self.kept))
        seen = zip(believed, *own, strict=False)
        rates = [(kept + PRIOR * rate) / (judged + PRIOR) for rate, judged, kept in seen]
        rates += [*rates[-1:], OPTIMISTIC][:1] * (gamma - len(rates))
        return [*accumulate(accumulate((1.0, *rates), mul))]


class Record(NamedTuple):
    """Which drafts were kept, by row and by place: where four of a round were, the fifth mostly is.

    Instead of rows there can be kinds of rows, of which something is believed beforehand.
    """

    rows: Sequence[Row] = ()  # [B]
    believed: Table | None = None  # [B, >= P], acceptance; None: rows go like all of them

    @property
    def known(self) -> bool:
        """Whether it rests on anything."""
        return self.believed is not None or len(self.rows) > 0

    def after(
        self,
        accepted: Table,  # [B, gamma + 1], how many rounds kept 0, 1, .. drafts,
        drafted: Table,  # [B, gamma + 1], and how many had so many
    ) -> "Record":
        """With more rounds. A draft is judged if all before it were kept."""
        if not any(any(row[1:]) for row in drafted):
            return self
        found = zip(self.rows or repeat(Row()), accepted, drafted, strict=False)
        return Record([row.after(kept, had) for row, kept, had in found], self.believed)

    def tokens(self, gamma: int) -> Table:  # [1 or B, gamma + 1]
        """Expected of a round of each row with 0, 1, .. gamma drafts, the target's own included.

        A row of which little is known goes as believed, or like all of them, where at least one
        round is known of all.
        """
        believed = self.believed
        if believed is None:
            judged = map(sum, zip_longest(*(row.judged for row in self.rows), fillvalue=0))
            kept = map(sum, zip_longest(*(row.kept for row in self.rows), fillvalue=0))
            rates = [k / n for n, k in zip(judged, kept, strict=True) if n >= 1]
            believed = [rates] * max(len(self.rows), 1)
        return [
            row.tokens(gamma, rates[:gamma])
            for row, rates in zip(self.rows or repeat(Row()), believed, strict=False)
        ]

    def forgotten(self) -> "Record":
        """The same until there are more rounds, which then count alone."""
        return self._replace(rows=[row._replace(rounds=0.0) for row in self.rows])


LIKELY = Record([Row([4], [3], 4)])  # three of four drafts are kept


class Clock:
    """What rounds take, over what was foreseen: a factor for each gamma of a menu.

    Every round is a noisy measurement of its gamma's factor, and says something of the others: the
    more, the nearer they are. That is a Kalman filter over the factors' logarithms. They wander, so
    what is known fades.
    """

    def __init__(self, gammas: Sequence[int]) -> None:
        self.places = {gamma: i for i, gamma in enumerate(gammas)}
        widths = [gamma + 1 for gamma in gammas]
        self.prior = [[SLIP**2 * math.sqrt(min(a, b) / max(a, b)) for b in widths] for a in widths]
        self.mean, self.covariance = [0.0] * len(widths), self.prior

    def saw(self, gamma: int, ratio: float) -> None:
        """A round took so many times what `corrected` times had foreseen."""
        i = self.places[gamma]
        at = self.covariance[i]
        gains = [c / (at[i] + NOISE**2) for c in at]
        error = min(max(math.log(ratio), -OUTLIER), OUTLIER)
        self.mean = [KEEP * (m + gain * error) for m, gain in zip(self.mean, gains, strict=True)]
        self.covariance = [
            [
                KEEP**2 * (c - gain * a) + (1 - KEEP**2) * p
                for c, a, p in zip(row, at, old, strict=True)
            ]
            for row, gain, old in zip(self.covariance, gains, self.prior, strict=True)
        ]

    def corrected(self, seconds: dict[int, float]) -> dict[int, float]:
        """Times by gamma, as rounds now take them."""
        return {g: s * math.exp(self.mean[self.places[g]]) for g, s in seconds.items()}


class Ahead(NamedTuple):
    """What is still to be decoded, and what forwards take."""

    remaining: Sequence[float]  # [B], tokens; 0 in rows that have ended
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
        return self.seconds(0, self.remaining)
