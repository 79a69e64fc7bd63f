"""Decide how to draft, from measured steps, a probe of acceptance, and what happens then.

`--draft auto` never asks the user to know whether speculation pays. It decides in three stages:

    calibrate   before the prompts: time plain steps and verifications, fit the cost model's
                constants to them (`roofline.fit`), and time each candidate's draft step; what
                rounds take later corrects it (`forecast.Clock`)
    probe       a few rounds with each candidate that could win, on the actual text; their tokens
                are output like any others. Prompt lookup needs none, because the length of a match
                tells what to expect of it: it goes first
    follow      use the candidate and gamma with the largest predicted speedup; every few rounds
                look at the acceptance of the latest ones, and change either, down to none. Where
                there is prompt lookup, look every round: how far to draft depends on the matches

The engine keeps a drafter for every candidate, so a change costs nothing. A draft that the user
named is used in any case, of `mixed` at least a part: only its gamma is chosen. The choice follows
the clock, but no text depends on it.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import NamedTuple

from device import median_seconds, timed
from drafter import Drafter
from forecast import LIKELY, Ahead, Clock, Record, Table, together
from model import Transformer
from parallel import from_first, reducer
from policies import Strategy
from roofline import GAMMAS, Hardware, Timing, Workload, fit, forward_time, preset, with_link
from spec_decode import Engine

MARGIN = 1.03  # a predicted gain below this is not worth its risk
PROBE_DRAFTS = 200  # drafted tokens after which an acceptance is known well enough
PROBE_SHARE = 0.04  # of the tokens still to come, at most, for probing each candidate
HOPE = 0.35  # of what a candidate of acceptance LIKELY would save, its trial may cost
FOLLOW = 2  # rounds between two looks at the acceptance, where nothing tells it beforehand
LEAD = 4  # rounds of who needs no trial before others may have one; looks that `gain` is a mean of
STAY = 1.05  # what another candidate must gain over the one in use
SWEEPS = 3  # of a calibration over its points: a shared machine is slow for a while, then fast
# There are more sweeps within SHORT seconds, and while the latest differ by a factor of STEADY:
# compilers that torch has started in the background slow all down for some seconds.
SHORT, STEADY, MAX_SWEEPS = 1.5, 1.3, 20
TIMED = 32  # tokens of context within which times are taken for the same
LARGER = 64  # times as many bytes are in the second all-reduce that is timed


@dataclass(slots=True, eq=False)
class Candidate:
    """A way to draft, what it costs, and how it did on this text."""

    strategy: Strategy  # its gamma is the largest of those that are compiled
    draft_model: Transformer | None = None
    drafter: Drafter = field(init=False, repr=False)  # the engine's, from the calibration on
    t_draft: float = 0.0  # T_D, seconds
    t_select: float = 0.0  # seconds of one selection,
    t_renew: float = 0.0  # and of what goes before the first one
    record: Record = field(default_factory=Record)
    kinds: list[int] | None = None  # of rows, as they are now, in the record; None: row by row
    probed: Record = field(default_factory=Record)  # that the first choice was made with, and by it
    foreseen: tuple[int, float] = (0, 0.0)  # the best gamma, and its acceptance

    def seconds(self, ahead: Ahead, gamma: int, rounds: Sequence[float]) -> float:
        """Of so many rounds of each row."""
        share = self.t_select / (self.drafter.select_every or math.inf)
        return ahead.seconds(gamma, rounds, gamma * self.t_draft + share)

    def best(
        self,
        ahead: Ahead,
        threshold: float = MARGIN,
        record: Record | None = None,  # None: its own
    ) -> "Choice":
        """With the gamma of the largest predicted speedup; no draft unless that is above."""
        gammas = [g for g in ahead.verify if g]
        rows = [*zip(ahead.remaining, cycle(self.tokens(max(gammas), record)), strict=False)]
        seconds = {g: self.seconds(ahead, g, [n / row[g] for n, row in rows]) for g in gammas}
        gamma = min(seconds, key=seconds.__getitem__)
        speedup = ahead.plain / seconds[gamma]
        return Choice(self, gamma, speedup) if speedup > threshold else Choice()

    def tokens(self, gamma: int, record: Record | None = None) -> Table:
        """[1 or B, gamma + 1], expected of the next round of a row with 0, 1, .. gamma drafts."""
        tokens = (record or self.record).tokens(gamma)
        return tokens if self.kinds is None else [tokens[kind] for kind in self.kinds]

    def saw(self, counts: list[list[list[int]]], alike: bool) -> None:  # [2, B + 1, n]
        """Keep in mind how often rows kept, and had, 0, 1, .. drafts; the last: texts that ended.

        Where rows are alike, one soon has the text of another.
        """
        B = len(counts[0]) - 1
        groups: list[list[int]] = [[*range(B + 1)]] if alike else [[b] for b in range(B)]
        if self.kinds is not None:
            groups = [[] for _ in self.drafter.trust or ()]
            for b, kind in enumerate(self.kinds):
                groups[kind].append(b)
        self.record = self.record.after(*(together(rows, groups) for rows in counts))

    def __str__(self) -> str:
        return ("draft model, " if self.draft_model else "") + str(self.strategy)


class Choice(NamedTuple):
    """Who drafts, how far, and the predicted speedup of what is to come."""

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
    hardware: Hardware = preset("cpu")  # as fitted
    fit_error: float = 0.0
    residual: dict[int, float] = field(default_factory=dict)  # gamma -> measured / predicted
    dropped: list[str] = field(default_factory=list)  # who is not considered any more, and why
    refilled: bool = False  # whether rows that end are followed by others
    times: dict[int, tuple[dict, dict]] = field(default_factory=dict)  # the latest, by length
    clock: Clock | None = None  # corrects them; None: they are true
    verify: dict[int, float] = field(default_factory=dict)  # `verify_seconds` of the first choice
    seen: Ahead = field(init=False)  # at the latest look
    gain: float = 1.0  # mean predicted speedup of the latest looks: one alone goes up and down
    first: Choice = Choice()  # after the probe
    used: Counter["Choice"] = field(default_factory=Counter)  # for how many tokens since then

    def calibrate(self, refills: bool = False) -> None:
        """Time and fit, before there is a text. ValueError if a draft that was named cannot be.

        With refills, compile also what rows need that begin while others run.
        """
        engine, self.refilled = self.engine, refills
        self.fit()
        ahead, kept = self.ahead(engine.max_len), []
        for c in self.candidates:
            try:
                c.drafter = engine.add(c.strategy, c.draft_model)
                self.measure(c, refills)
                if not (self.named or c.best(ahead).gamma):
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
            c.t_renew = median_seconds(engine.device, c.drafter.renew, 1)
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
            took = [sum(seconds) for seconds in zip(*times.values(), strict=True)]
            latest = took[-SWEEPS:]
            if sweep > SWEEPS and sum(took) > SHORT and max(latest) < STEADY * min(latest):
                break
            for (length, gamma), seconds in times.items():
                with engine.pretend(length):
                    seconds.append(timed(engine.device, work[gamma])[0])
        half = max(len(took) // 2, 1)  # the first of all compiles
        timings = [
            Timing(
                self.workload(length), self.width(gamma), length, statistics.median(seconds[half:])
            )
            for (length, gamma), seconds in times.items()
        ]
        hw = preset(engine.device.type)
        if config.n_ranks > 1:
            hw = with_link(hw, config.n_ranks, self.time_all_reduces())
        self.hardware, self.fit_error = fit(config, hw, timings)
        expected = (forward_time(config, self.hardware, t.workload, t.T).total for t in timings)
        pairs = [(t.seconds, seconds) for t, seconds in zip(timings, expected, strict=True)]
        for i, gamma in enumerate(gammas):
            measured, predicted = map(sum, zip(*pairs[i :: len(gammas)], strict=True))
            self.residual[gamma] = measured / predicted
        self.times = {}
        # Rounds of a GPU need not end before the next one begins, and ranks must decide alike.
        learns = engine.device.type == "cpu" and config.n_ranks == 1
        self.clock = Clock(gammas) if learns else None

    def time_all_reduces(self) -> dict[int, float]:
        """Seconds by bytes, of those in a plain step and of much larger ones."""
        engine, times = self.engine, {}
        model, B = engine.model, self.engine.batch.n_rows
        for n_tokens in (B, B * LARGER):
            work = engine.capture(reducer(model, n_tokens))
            n_bytes = n_tokens * model.config.dim * engine.full.spec.dtype.itemsize
            times[n_bytes] = median_seconds(engine.device, work)
        return times

    def workload(self, length: int) -> Workload:
        """This batch, all rows of that length."""
        spec = self.engine.full.spec
        sizes = {"itemsize": spec.dtype.itemsize, "kv_itemsize": spec.stored_dtype.itemsize}
        return Workload(spec.batch_size, length, **sizes)

    def verify_seconds(self, length: int, seen: int | None = None) -> dict[int, float]:
        """T_V by gamma at that length. Gamma 0 is T_T.

        `seen` tokens are read instead, if given: none in rows that have ended.
        """
        parts = self.engine.model.config, self.hardware, self.workload(length)
        return {
            g: forward_time(*parts, self.width(g), seen).total * r for g, r in self.residual.items()
        }

    def width(self, gamma: int) -> int:
        """Tokens of a row in a verification of so many drafts."""
        return max(gamma, self.engine.full.spec.exact) + 1

    def ahead(self, length: int | None = None) -> Ahead:
        """What the rows still have to do, or before there is a text, all the same at a length."""
        batch = self.engine.batch
        n, limits, ended = (t.tolist() for t in (batch.seq_len, batch.limit, batch.finished))
        left = [max(to - at, 0) * (not end) for at, to, end in zip(n, limits, ended, strict=True)]
        length = length or TIMED * math.ceil(sum(n) / len(n) / TIMED)
        if length not in self.times:
            self.times = {length: (self.verify_seconds(length), self.verify_seconds(length, 0))}
        verify, idle = self.times[length]
        if self.clock:
            verify, idle = map(self.clock.corrected, (verify, idle))
        return Ahead(left if any(left) else [1] * len(left), verify, idle, self.refilled)

    def rounds(self) -> Iterator[None]:
        """Rounds until every row is finished: probe, choose, follow. ValueError without a text.

        After each, the caller may start other rows.
        """
        self.gain = 1.0
        for c in self.candidates:
            c.record = Record(believed=c.drafter.trust)
        yield from self.lead()
        yield from self.probe()
        ahead = self.look()
        for c in self.candidates:
            gamma = c.best(ahead, 0.0).gamma
            tokens = statistics.fmean(row[gamma] for row in c.tokens(gamma))
            c.probed, c.foreseen = c.record, (gamma, (tokens - 1) / gamma)
        self.verify, self.first = ahead.verify, self.choose(ahead, None, 1.0)
        self.used.clear()
        yield from self.follow()

    def look(self) -> Ahead:
        """What is ahead, and of what kind rows are now."""
        for c in self.candidates:
            c.kinds = c.drafter.kinds()
        self.seen = self.ahead()
        return self.seen

    def run(self, c: Candidate | None, gamma: int, n: int) -> Iterator[None]:
        """Up to n rounds with it, which it keeps in mind."""
        batch = self.engine.batch
        self.engine.switch(c.drafter if c else None)
        before = after = batch.counts.clone()
        running, start = self.engine.watch.running, time.perf_counter()
        for _ in self.engine.rounds(gamma, n):
            if self.clock and not (c and c.drafter.caches):  # what takes time is verifying
                foreseen = self.seen.seconds(gamma, running)
                self.clock.saw(gamma, (time.perf_counter() - start) / foreseen)
            after = batch.counts.clone()
            yield  # here other rows may start
            running, start = self.engine.watch.running, time.perf_counter()
        counts = (after - before)[..., : gamma + 1].tolist()
        made = (n * times for row in counts[0] for n, times in enumerate(row, 1))
        self.used[Choice(c, gamma)] += sum(made)
        if c:
            c.saw(counts, self.refilled)

    def lead(self) -> Iterator[None]:
        """The first rounds, with who needs no trial, if others may have one.

        The others have to win over what is known of it then.
        """
        known = [c.record.known for c in self.candidates]
        for i in range(LEAD if any(known) and not all(known) else 0):
            c, gamma, speedup = self.choose(self.look(), None, 1.0)
            self.gain += (speedup - self.gain) / (i + 1)
            yield from self.run(c, gamma, 1)

    def worth_trying(self, c: Candidate, ahead: Ahead, best: float) -> bool:
        """Whether nothing is known of it, and a trial costs at most HOPE of what it may save.

        `best` is the speedup that there is without it. A draft that was asked for by name, alone,
        has a trial in any case.
        """
        if c.record.known:
            return False
        quarter = [self.quarter(ahead)] * len(ahead.remaining)
        saving = ahead.plain / best - ahead.plain / c.best(ahead, record=LIKELY).speedup
        cost = c.seconds(ahead, self.shorter, quarter) - ahead.seconds(0, quarter)
        asked_for = self.named and len(self.candidates) == 1
        return asked_for or HOPE * saving >= cost + c.t_renew + c.t_select

    @property
    def shorter(self) -> int:
        """The second longest drafts, if there are two."""
        return self.gammas[-2:][0]

    def quarter(self, ahead: Ahead) -> int:
        """Rounds of a quarter of a trial, at least one: for PROBE_DRAFTS and PROBE_SHARE."""
        rows, to_come = len(ahead.remaining), statistics.fmean(ahead.remaining)
        n = math.ceil(PROBE_DRAFTS / (self.shorter * rows) / 4)
        return max(min(n, int(PROBE_SHARE * to_come / 4)), 1)

    def probe(self) -> Iterator[None]:
        """A few rounds with each candidate of which nothing is known, and that could be the best.

        A trial is short: at most PROBE_SHARE of the tokens to come. It is stopped after a quarter
        if the candidate cannot win any more. Its first quarter has the second longest drafts: the
        longest are tried where all of these are kept.
        """
        ahead, known = self.look(), any(c.record.known for c in self.candidates)
        n = self.quarter(ahead)
        best = max(self.choose(ahead, None, 1.0).speedup, self.gain) if known else 1.0
        for c in sorted(self.candidates, key=lambda c: -c.best(ahead).speedup):
            if not self.worth_trying(c, ahead, best):
                continue
            gamma = self.shorter
            for _ in range(4):
                yield from self.run(c, gamma, n)
                choice = c.best(ahead, threshold=0.0)
                gamma = choice.gamma
                if choice.speedup <= 0.9 * best:
                    break
            best = max(best, c.best(ahead).speedup)

    def choose(self, ahead: Ahead, now: Candidate | None, stay: float) -> Choice:
        """The largest predicted speedup; another candidate than `now` must gain `stay`."""
        options, threshold = ([], 0.0) if self.named else ([Choice()], MARGIN)
        known = [c for c in self.candidates if c.record.known]
        known = known or (self.candidates if self.named else [])
        options += [c.best(ahead, threshold) for c in known]
        best = max(options, key=lambda o: o.speedup * (stay if o.candidate is now else 1.0))
        return self.agreed(best)

    def agreed(self, choice: Choice) -> Choice:
        """Rank 0's choice, where several run one model."""
        who = self.candidates.index(choice.candidate) if choice.candidate else None
        who, *rest = from_first((who, choice.gamma, choice.speedup))
        return Choice(None if who is None else self.candidates[who], *rest)

    def follow(self) -> Iterator[None]:
        """Rounds to the end, with what the latest acceptance asks for.

        A draft that was given up is tried again after a pause, longer every time. One that was not
        worth a trial has it when it is.
        """
        choice, idle, pause, looks = self.first, 0, 16 * FOLLOW, 0
        while True:
            c, gamma, _ = choice
            told = any(one.drafter.trust is not None for one in ([c] if c else self.candidates))
            n = 1 if told else FOLLOW if c else pause
            yield from self.run(c, gamma, n)
            if all(self.engine.watch.rows):
                return
            idle = 0 if gamma else idle + n
            if idle >= pause:
                idle, pause = 0, 2 * pause
                for other in self.candidates:
                    other.record = other.probed.forgotten()
            ahead, looks = self.look(), looks + 1
            choice = self.choose(ahead, c, STAY)
            self.gain += (choice.speedup - self.gain) / LEAD
            if looks % LEAD == 0 and any(
                self.worth_trying(other, ahead, self.gain) for other in self.candidates
            ):
                yield from self.probe()
                choice = self.choose(self.look(), c, STAY)

    @property
    def mostly(self) -> Choice:
        """What most tokens came from since the first choice."""
        return self.used.most_common(1)[0][0] if self.used else self.first

    def decision(self) -> dict:
        """What was decided first, and by which numbers, for the JSON; seconds."""
        candidates = []
        for c in self.candidates:
            entry = {"draft": str(c), "t_draft": c.t_draft, "t_select": c.t_select}
            if c.probed.known:
                entry |= zip(("gamma", "acceptance"), c.foreseen, strict=True)
            candidates.append(entry)
        return {
            "predicted_speedup": self.first.speedup,
            "mostly": str(self.mostly),
            "fit_error": self.fit_error,
            "dropped": self.dropped,
            "verify_seconds": self.verify,
            "candidates": candidates,
        }

    def explain(self) -> str:
        """The decision and the numbers behind it, in two lines."""
        steps = [f"T_V({g}) {1e3 * t:.1f}" if g else f"T_T {1e3 * t:.1f} ms"
                 for g, t in self.verify.items()]  # fmt: skip
        about, alone = [], len(self.candidates) == 1
        for c in self.decision()["candidates"]:
            words = "acceptance {acceptance:.2f} at gamma {gamma}" if "gamma" in c else "not probed"
            about.append(f"{c['draft']}: T_D {1e3 * c['t_draft']:.1f} ms, {words.format(**c)}")
        return (
            f"auto: {self.first}{' (the draft as asked)' if self.named and alone else ''}, "
            f"predicted speedup {self.first.speedup:.2f}; mostly {self.mostly}\n"
            f"      {', '.join(steps)} ms (fit within {self.fit_error:.0%}); "
            f"{'; '.join(about + self.dropped)}"
        )
