"""Decide how to draft, from measured steps, a probe of acceptance, and what happens then.

`--draft auto` never asks the user to know whether speculation pays. It decides in three stages:

    calibrate   before the prompts: time plain steps and verifications, fit the cost model's
                constants to them (`roofline.fit`), and time each candidate's draft step
    probe       the first rounds of decoding: a few with each candidate that could win, on the
                actual text; their tokens are output like any others. Prompt lookup needs none:
                its guesses can be held against the text that is there
    follow      use the candidate and gamma with the largest predicted speedup; every few rounds
                look at the acceptance of the latest ones, and change either, down to none

The engine keeps a drafter for every candidate, so a change costs nothing. A draft that the user
named is used in any case: only its gamma is chosen. The choice follows the clock, but no text
depends on it. Rows that begin while others run change nothing either: what is followed is the
acceptance of whatever runs.
"""

import math
import statistics
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import NamedTuple

from cost_model import round_cost
from device import median_seconds, timed
from drafter import Drafter
from model import Transformer
from policies import Strategy
from roofline import HARDWARE, Hardware, Timing, Workload, fit, forward_time
from spec_decode import Engine

GAMMAS, LONGEST = (2, 5), 12  # compiled draft lengths on the CPU (LOG.md); the most on a GPU
OPTIMISTIC = 0.95  # an acceptance that real text hardly exceeds
MARGIN = 1.03  # a predicted gain below this is not worth its risk
PROBE_DRAFTS = 200  # drafted tokens after which an acceptance is known well enough
PROBE_SHARE = 0.04  # of the tokens still to come, at most, for probing each candidate
HOPE = 0.05  # the chance that a candidate not yet probed is as good as OPTIMISTIC
FOLLOW = 4  # rounds between two looks at the acceptance
STAY = 1.05  # what another candidate must gain over the one in use
SWEEPS = 3  # of a calibration over its points: a shared machine is slow for a while, then fast
SHORT, MAX_SWEEPS = 0.3, 20  # seconds: while all sweeps took less, there are more
MEMORY = 16  # rounds of a row: what all earlier ones count for, at most, when new ones come
Trial = Generator[None, None, tuple[list[int], list[int]]]  # yields after each round


@dataclass(frozen=True, slots=True)
class Record:
    """Which drafts were kept, place by place: where four of a round were, the fifth mostly is."""

    places: tuple[tuple[float, float], ...] = ()  # how often judged, and kept
    rounds: float = 0.0  # of a row, that they rest on

    def after(self, accepted: list[int], drafted: list[int], memory: float = MEMORY) -> "Record":
        """With more rounds of rows: how many kept n drafts, and how many had n, at index n.

        A draft is judged if all before it were kept. Earlier rounds count for `memory` at most.
        """
        if not any(drafted[1:]):
            return self
        share = min(self.rounds, memory) / self.rounds if self.rounds else 0.0
        old = [(share * judged, share * kept) for judged, kept in self.places]
        kept, had = ([sum(h[i:]) for i in range(len(h))] for h in (accepted, drafted))  # i or more
        rooms = [b / max(a, 1) for a, b in pairwise(had)]  # of those with i - 1 drafts, had an i-th
        new = [(max(a * room, b), b) for (a, b), room in zip(pairwise(kept), rooms, strict=True)]
        pairs = zip_longest(old, new, fillvalue=(0.0, 0.0))
        places = tuple((a + c, b + d) for (a, b), (c, d) in pairs)
        return Record(places, share * self.rounds + sum(accepted))

    def tokens(self, gamma: int) -> float:
        """Expected of a round, the target's own included.

        A place of which less than one round is known goes like the place before it.
        """
        rate, reached, total = OPTIMISTIC, 1.0, 1.0
        for i in range(gamma):
            judged, kept = self.places[i] if i < len(self.places) else (0.0, 0.0)
            rate = kept / judged if judged >= 1 else rate
            reached *= rate
            total += reached
        return total


@dataclass(slots=True, eq=False)
class Candidate:
    """A way to draft, what it costs, and how it did on this text."""

    strategy: Strategy  # its gamma is the largest of those that are compiled
    draft_model: Transformer | None = None
    drafter: Drafter = field(init=False, repr=False)  # the engine's, from the calibration on
    t_draft: float = 0.0  # T_D, seconds
    t_select: float = 0.0  # seconds of one selection
    record: Record = Record()
    probed: Record = Record()  # the record that the first choice was made with,
    foreseen: int = 0  # and the gamma that was best by it

    def round_cost(self, gamma: int, verify: dict[int, float]) -> float:
        """Plain steps that a round takes."""
        share = self.t_select / (self.drafter.select_every or math.inf)
        return round_cost(gamma, verify[0], self.t_draft, verify[gamma] + share)

    def best(self, verify: dict[int, float], threshold: float = MARGIN) -> "Choice":
        """With the gamma of the largest predicted speedup; no draft unless that is above."""
        speedups = {g: self.record.tokens(g) / self.round_cost(g, verify) for g in verify if g}
        gamma = max(speedups, key=lambda g: speedups[g])
        return Choice(self, gamma, speedups[gamma]) if speedups[gamma] > threshold else Choice()

    def __str__(self) -> str:
        return ("draft model, " if self.draft_model else "") + str(self.strategy)


class Choice(NamedTuple):
    """Who drafts, how far, and the predicted speedup."""

    candidate: Candidate | None = None
    gamma: int = 0
    speedup: float = 1.0

    def __str__(self) -> str:
        return f"{self.candidate}, gamma {self.gamma}" if self.gamma else "no draft"


@dataclass(eq=False)
class Auto:
    """Decides for one engine: `calibrate` before the prefill, `decode` after it."""

    engine: Engine
    candidates: list[Candidate]
    gammas: tuple[int, ...] = GAMMAS
    named: bool = False  # the candidate was asked for: it drafts from the first round on
    hardware: Hardware = HARDWARE["cpu"]  # as fitted
    fit_error: float = 0.0
    residual: dict[int, float] = field(default_factory=dict)  # gamma -> measured / predicted
    dropped: list[str] = field(default_factory=list)  # who is not considered any more, and why
    verify: dict[int, float] = field(default_factory=dict)  # `verify_seconds` of the first choice
    first: Choice = Choice()  # after the probe
    last: str = ""  # what was used when the last row finished

    def calibrate(self, refills: bool = False) -> None:
        """Time and fit, before there is a text. ValueError if a draft that was named cannot be.

        With refills, compile also what rows need that begin while others run.
        """
        engine = self.engine
        self.fit()
        verify, kept = self.verify_seconds(engine.max_len), []
        for c in self.candidates:
            try:
                c.drafter = engine.add(c.strategy, c.draft_model)
                self.measure(c, refills)
                if not (self.named or c.best(verify).gamma):
                    engine.remove(c.drafter)
                    del c.drafter  # its memory is free for the next candidate
                    raise ValueError(f"T_D {1e3 * c.t_draft:.1f} ms, could not win")
                kept.append(c)
            except ValueError as e:
                if self.named:
                    raise
                self.dropped.append(f"{c}: {e}")
        self.candidates = kept
        engine.switch(kept[0].drafter if len(kept) == 1 else None)

    def measure(self, c: Candidate, refills: bool) -> None:
        """Time its draft step and its selection; compile and capture its rounds."""
        engine, gamma = self.engine, max(self.gammas)
        engine.switch(c.drafter)
        engine.warm_up_rounds(refills)
        with engine.pretend(engine.max_len):
            c.t_select = median_seconds(engine.device, c.drafter.select, 1)
            for shorter in self.gammas:
                engine.decide(engine.draft(shorter))
                engine.capture_round(shorter)
            draft = engine.capture(lambda: engine.draft(gamma))
            c.t_draft = median_seconds(engine.device, draft) / gamma

    def fit(self) -> None:
        """Fit the cost model to plain steps and verifications, with what is decided by them.

        All are timed in turn, several times. What the formula misses is a factor for each gamma.
        """
        engine, config, gammas = self.engine, self.engine.model.config, (0, *self.gammas)
        engine.switch(None)  # verifies with the full cache alone
        drafts = {g: engine.batch.tokens[:, :g] for g in gammas}
        work = {g: engine.capture(lambda d=draft: engine.decide(d)) for g, draft in drafts.items()}
        lengths = (max(engine.max_len // 8, 2), engine.max_len)
        times: dict[tuple[int, int], list[float]] = {(n, g): [] for n in lengths for g in gammas}
        for sweep in range(MAX_SWEEPS + 1):
            if sweep > SWEEPS and sum(map(sum, times.values())) > SHORT:
                break
            for (length, gamma), seconds in times.items():
                with engine.pretend(length):
                    seconds.append(timed(engine.device, work[gamma])[0])
        timings = [
            Timing(self.workload(length), gamma + 1, length, statistics.median(seconds[1:]))
            for (length, gamma), seconds in times.items()
        ]
        preset = HARDWARE["h200" if engine.device.type == "cuda" else "cpu"]
        self.hardware, self.fit_error = fit(config, preset, timings)
        expected = (forward_time(config, self.hardware, t.workload, t.T).total for t in timings)
        ratios = [t.seconds / seconds for t, seconds in zip(timings, expected, strict=True)]
        self.residual = {g: statistics.mean(ratios[i :: len(gammas)]) for i, g in enumerate(gammas)}

    def workload(self, length: int) -> Workload:
        """This batch, all rows of that length."""
        spec = self.engine.full.spec
        sizes = {"itemsize": spec.dtype.itemsize, "kv_itemsize": spec.stored_dtype.itemsize}
        return Workload(spec.batch_size, length, **sizes)

    def verify_seconds(self, length: int | None = None) -> dict[int, float]:
        """T_V by gamma at that length, None: the rows' mean length. Gamma 0 is T_T."""
        w = self.workload(length or int(self.engine.batch.seq_len.float().mean()))
        config, hw = self.engine.model.config, self.hardware
        return {g: forward_time(config, hw, w, g + 1).total * r for g, r in self.residual.items()}

    def rounds(self) -> Iterator[None]:
        """Rounds until every row is finished: probe, choose, follow. ValueError without a text.

        After each, the caller may start other rows.
        """
        self.verify = self.verify_seconds()
        for c in self.candidates:
            c.record = Record()
        self.look_back()
        yield from self.probe(self.verify)
        self.look_back()  # now there is some new text to judge by
        for c in self.candidates:
            c.probed, c.foreseen = c.record, c.best(self.verify, threshold=0.0).gamma
        self.first = self.choose(self.verify, None, 1.0)
        yield from self.follow()

    def look_back(self, drafting: Candidate | None = None) -> None:
        """Let those that judge themselves do so, by the text that is there now."""
        for c in self.candidates:
            if c is not drafting and c.drafter.judges_itself:
                c.record = c.record.after(*c.drafter.look_back(c.strategy.gamma), memory=0)

    def run(self, c: Candidate | None, gamma: int, n: int) -> Trial:
        """Up to n rounds with it. Returns how often a row kept 0, 1, .. gamma drafts, and had."""
        batch = self.engine.batch
        self.engine.switch(c.drafter if c else None)
        before = batch.counts.sum(dim=1)
        yield from self.engine.rounds(gamma, n)
        counts = batch.counts.sum(dim=1) - before
        return tuple(counts[:, : gamma + 1].tolist())

    def probe(self, verify: dict[int, float]) -> Iterator[None]:
        """A few rounds with each candidate that could still be the best one.

        A trial is short: at most PROBE_SHARE of the tokens to come. It is skipped if its cost
        exceeds HOPE times the best saving, and stopped after a quarter if the candidate cannot win
        any more. Its first quarter has the second longest drafts: the longest are tried where all
        of these are kept. A draft that was asked for by name has a trial in any case.
        """
        batch, first = self.engine.batch, self.gammas[-2:][0]
        to_come = float((batch.limit - batch.seq_len).float().mean())
        n = math.ceil(PROBE_DRAFTS / (first * batch.n_rows) / 4)  # rounds of a quarter
        n = max(min(n, int(PROBE_SHARE * to_come / 4)), 1)
        best = max([1.0, *(c.best(verify).speedup for c in self.candidates if c.record.places)])
        for c in sorted(self.candidates, key=lambda c: -c.best(verify).speedup):
            saving = to_come / best - to_come / c.best(verify).speedup  # in plain steps
            hopeless = HOPE * saving < n * (c.round_cost(first, verify) - 1)
            if c.drafter.judges_itself or (hopeless and not self.named):
                continue
            gamma = first
            for _ in range(4):
                c.record = c.record.after(*(yield from self.run(c, gamma, n)))
                choice = c.best(verify, threshold=0.0)
                gamma = choice.gamma
                if choice.speedup <= 0.9 * best:
                    break
            best = max(best, c.best(verify).speedup)

    def choose(self, verify: dict[int, float], now: Candidate | None, stay: float) -> Choice:
        """The largest predicted speedup; another candidate than `now` must gain `stay`."""
        options, threshold = ([], 0.0) if self.named else ([Choice()], MARGIN)
        known = (c for c in self.candidates if c.record.places or self.named)
        options += [c.best(verify, threshold) for c in known]
        return max(options, key=lambda o: o.speedup * (stay if o.candidate is now else 1.0))

    def follow(self) -> Iterator[None]:
        """Rounds to the end, with what the latest acceptance asks for.

        A draft that was given up is tried again after a pause, longer every time.
        """
        choice, idle, pause = self.first, 0, 8 * FOLLOW
        watching = any(c.drafter.judges_itself for c in self.candidates)
        while True:
            self.last, (c, gamma, _) = str(choice), choice
            n = FOLLOW if gamma or watching else pause
            rounds = yield from self.run(c, gamma, n)
            if all(self.engine.watch.rows):
                return
            idle = 0 if gamma else idle + n
            if c:
                c.record = c.record.after(*rounds)
            elif idle >= pause:
                idle, pause = 0, 2 * pause
                for other in self.candidates:
                    other.record = replace(other.probed, rounds=0.0)  # what comes now counts alone
            self.look_back(c)
            choice = self.choose(self.verify_seconds(), c, STAY)

    def decision(self) -> dict:
        """What was decided first, and by which numbers, for the JSON; seconds."""
        candidates = []
        for c in self.candidates:
            entry = {"draft": str(c), "t_draft": c.t_draft, "t_select": c.t_select}
            if (gamma := c.foreseen) and c.probed.places:
                entry |= {"gamma": gamma, "acceptance": (c.probed.tokens(gamma) - 1) / gamma}
            candidates.append(entry)
        return {
            "predicted_speedup": self.first.speedup,
            "at_the_end": self.last,
            "fit_error": self.fit_error,
            "dropped": self.dropped,
            "verify_seconds": self.verify,
            "candidates": candidates,
        }

    def explain(self) -> str:
        """The decision and the numbers behind it, in two lines."""
        steps = [f"T_V({g}) {1e3 * t:.1f}" if g else f"T_T {1e3 * t:.1f} ms"
                 for g, t in self.verify.items()]  # fmt: skip
        about = []
        for c in self.decision()["candidates"]:
            words = "acceptance {acceptance:.2f} at gamma {gamma}" if "gamma" in c else "not probed"
            about.append(f"{c['draft']}: T_D {1e3 * c['t_draft']:.1f} ms, {words.format(**c)}")
        return (
            f"auto: {self.first}{' (the draft as asked)' if self.named else ''}, "
            f"predicted speedup {self.first.speedup:.2f}; at the end {self.last}\n"
            f"      {', '.join(steps)} ms (fit within {self.fit_error:.0%}); "
            f"{'; '.join(about + self.dropped)}"
        )


def draft_lengths(device_type: str, n_group: int) -> tuple[int, ...]:
    """The values of gamma that are worth compiling, ascending; n_group is G, heads per KV head.

    CUDA computes attention in tiles of 16, 32 or 64 queries, whatever G * (gamma + 1) is. Drafts
    that fill a tile are free. More than 12 are rarely kept.
    """
    if device_type != "cuda":
        return GAMMAS
    n_tokens = {2, 4} | {min(tile // n_group, LONGEST + 1) for tile in (16, 32, 64)}
    return tuple(sorted(n - 1 for n in n_tokens if n > 1))
