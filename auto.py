"""Decide how to draft, from measured steps, a probe of acceptance, and what happens then.

`--draft auto` never asks the user to know whether speculation pays. It decides in three stages:

    calibrate   before the prompts: time plain steps and verifications, fit the cost model's
                constants to them (`roofline.fit`), and time each candidate's draft step
    probe       a few rounds with each candidate that could win, on the actual text; their tokens
                are output like any others. Prompt lookup needs none, because its guesses can be
                held against the text that is there: it goes first, where it pays
    follow      use the candidate and gamma with the largest predicted speedup; every few rounds
                look at the acceptance of the latest ones, and change either, down to none

The engine keeps a drafter for every candidate, so a change costs nothing. A draft that the user
named is used in any case, of `mixed` at least a part: only its gamma is chosen. The choice follows
the clock, but no text depends on it.
"""

import math
import statistics
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from device import median_seconds, timed
from drafter import Drafter
from forecast import LIKELY, Ahead, Record
from model import Transformer
from parallel import from_first, reducer
from policies import Strategy
from roofline import HARDWARE, Hardware, Timing, Workload, fit, forward_time, preset, with_link
from spec_decode import Engine

GAMMAS, LONGEST = (2, 5, 12), 12  # compiled draft lengths on the CPU (LOG.md); the most on a GPU
MARGIN = 1.03  # a predicted gain below this is not worth its risk
PROBE_DRAFTS = 200  # drafted tokens after which an acceptance is known well enough
PROBE_SHARE = 0.04  # of the tokens still to come, at most, for probing each candidate
HOPE = 0.25  # of what a candidate of acceptance LIKELY would save, its trial may cost
FOLLOW = 2  # rounds between two looks at the acceptance
STAY = 1.05  # what another candidate must gain over the one in use
SWEEPS = 3  # of a calibration over its points: a shared machine is slow for a while, then fast
# There are more sweeps within SHORT seconds, and while the latest differ by a factor of STEADY:
# compilers that torch has started in the background slow all down for some seconds.
SHORT, STEADY, MAX_SWEEPS = 1.5, 1.3, 20
LARGER = 64  # times as many bytes are in the second all-reduce that is timed
Trial = Generator[None, None, tuple[Tensor, Tensor]]  # yields after each round


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
    probed: Record = field(default_factory=Record)  # that the first choice was made with,
    foreseen: int = 0  # and the gamma that was best by it

    def seconds(self, ahead: Ahead, gamma: int, rounds: Tensor) -> float:  # [B]
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
        tokens = (record or self.record).tokens(max(ahead.verify))
        speedups = {
            g: ahead.plain / self.seconds(ahead, g, ahead.remaining / tokens[:, g])
            for g in ahead.verify
            if g
        }
        gamma = max(speedups, key=speedups.__getitem__)
        return Choice(self, gamma, speedups[gamma]) if speedups[gamma] > threshold else Choice()

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
    hardware: Hardware = HARDWARE["cpu"]  # as fitted
    fit_error: float = 0.0
    residual: dict[int, float] = field(default_factory=dict)  # gamma -> measured / predicted
    dropped: list[str] = field(default_factory=list)  # who is not considered any more, and why
    refilled: bool = False  # whether rows that end are followed by others
    verify: dict[int, float] = field(default_factory=dict)  # `verify_seconds` of the first choice
    first: Choice = Choice()  # after the probe
    last: str = ""  # what was used when the last row finished

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

    def verify_seconds(self, length: int | None, seen: int | None = None) -> dict[int, float]:
        """T_V by gamma at that length, None: the rows' mean length. Gamma 0 is T_T.

        `seen` tokens are read instead, if given: none in rows that have ended.
        """
        w = self.workload(length or int(self.engine.batch.seq_len.float().mean()))
        parts = self.engine.model.config, self.hardware, w
        return {
            g: forward_time(*parts, self.width(g), seen).total * r for g, r in self.residual.items()
        }

    def width(self, gamma: int) -> int:
        """Tokens of a row in a verification of so many drafts."""
        return max(gamma, self.engine.full.spec.exact) + 1

    def ahead(self, length: int | None = None) -> Ahead:
        """What the rows still have to do, or before there is a text, all the same at a length."""
        batch = self.engine.batch
        left = (batch.limit - batch.seq_len).masked_fill(batch.finished, 0).clamp_min(0)
        remaining = (left if left.any() else torch.ones_like(left)).float().cpu()
        times = self.verify_seconds(length), self.verify_seconds(length, 0)
        return Ahead(remaining, *times, self.refilled)

    def rounds(self) -> Iterator[None]:
        """Rounds until every row is finished: probe, choose, follow. ValueError without a text.

        After each, the caller may start other rows.
        """
        for c in self.candidates:
            c.record = Record()
        self.look_back()
        drafted = yield from self.lead()
        yield from self.probe()
        self.look_back(drafted)  # now there is some new text to judge by
        ahead = self.ahead()
        for c in self.candidates:
            c.probed, c.foreseen = c.record, c.best(ahead, 0.0).gamma
        self.verify, self.first = ahead.verify, self.choose(ahead, None, 1.0)
        yield from self.follow()

    def look_back(self, drafting: Candidate | None = None) -> None:
        """Let those that judge themselves do so, by the text that is there now."""
        for c in self.candidates:
            if c is not drafting and c.drafter.judges_itself:
                accepted, drafted = map(self.by_row, c.drafter.look_back(c.strategy.gamma))
                c.record = c.record.after(accepted, drafted, memory=0)

    def by_row(self, counts: Tensor) -> Tensor:  # [B, n] -> [B, n], or [1, n]
        """Histograms on the host, of all rows together where a row's text may be another's soon."""
        return (counts.sum(dim=0, keepdim=True) if self.refilled else counts).cpu()

    def run(self, c: Candidate | None, gamma: int, n: int) -> Trial:
        """Up to n rounds with it. Returns how often rows kept 0, 1, .. gamma drafts, and had."""
        batch = self.engine.batch
        self.engine.switch(c.drafter if c else None)
        before = batch.counts.clone()
        yield from self.engine.rounds(gamma, n)
        counts = (batch.counts - before)[..., : gamma + 1]
        accepted, drafted = counts if self.refilled else counts[:, :-1]  # the last: ended texts
        return self.by_row(accepted), self.by_row(drafted)

    def lead(self) -> Generator[None, None, Candidate | None]:
        """The first rounds, with who needs no trial, if others may have one. Returns who drafted.

        What is written tells more of it than the prompt. The others have to win over that.
        """
        known = [c.record.known for c in self.candidates]
        if all(known) or not any(known):
            return None
        drafted = None
        for _ in range(2):  # looks: greedy text often repeats more than it did at first
            c, gamma, _ = self.choose(self.ahead(), None, 1.0)
            if not c:
                break
            drafted, c.record = c, c.record.after(*(yield from self.run(c, gamma, FOLLOW)))
        return drafted

    def worth_trying(self, c: Candidate, ahead: Ahead, best: float) -> bool:
        """Whether nothing is known of it, and a trial costs at most HOPE of what it may save.

        `best` is the speedup that there is without it. A draft that was asked for by name, alone,
        has a trial in any case.
        """
        if c.record.known or c.drafter.judges_itself:
            return False
        quarter = torch.full_like(ahead.remaining, self.quarter(ahead))
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
        rows, to_come = len(ahead.remaining), float(ahead.remaining.mean())
        n = math.ceil(PROBE_DRAFTS / (self.shorter * rows) / 4)
        return max(min(n, int(PROBE_SHARE * to_come / 4)), 1)

    def probe(self) -> Iterator[None]:
        """A few rounds with each candidate of which nothing is known, and that could be the best.

        A trial is short: at most PROBE_SHARE of the tokens to come. It is stopped after a quarter
        if the candidate cannot win any more. Its first quarter has the second longest drafts: the
        longest are tried where all of these are kept.
        """
        ahead, known = self.ahead(), any(c.record.known for c in self.candidates)
        n, best = self.quarter(ahead), self.choose(ahead, None, 1.0).speedup if known else 1.0
        for c in sorted(self.candidates, key=lambda c: -c.best(ahead).speedup):
            if not self.worth_trying(c, ahead, best):
                continue
            gamma = self.shorter
            for _ in range(4):
                c.record = c.record.after(*(yield from self.run(c, gamma, n)))
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
        choice, idle, pause = self.first, 0, 16 * FOLLOW
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
                    forgotten = torch.zeros_like(other.probed.rounds)  # what comes counts alone
                    other.record = replace(other.probed, rounds=forgotten)
            self.look_back(c)
            ahead = self.ahead()
            choice = self.choose(ahead, c, STAY)
            if any(self.worth_trying(other, ahead, choice.speedup) for other in self.candidates):
                yield from self.probe()
                choice = self.choose(self.ahead(), c, STAY)

    def decision(self) -> dict:
        """What was decided first, and by which numbers, for the JSON; seconds."""
        candidates = []
        for c in self.candidates:
            entry = {"draft": str(c), "t_draft": c.t_draft, "t_select": c.t_select}
            if (gamma := c.foreseen) and c.probed.known:
                tokens = float(c.probed.tokens(gamma)[:, gamma].mean())
                entry |= {"gamma": gamma, "acceptance": (tokens - 1) / gamma}
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
        about, alone = [], len(self.candidates) == 1
        for c in self.decision()["candidates"]:
            words = "acceptance {acceptance:.2f} at gamma {gamma}" if "gamma" in c else "not probed"
            about.append(f"{c['draft']}: T_D {1e3 * c['t_draft']:.1f} ms, {words.format(**c)}")
        return (
            f"auto: {self.first}{' (the draft as asked)' if self.named and alone else ''}, "
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
