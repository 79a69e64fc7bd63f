"""Decide how to draft, from measured steps, a probe of acceptance, and what happens then.

`--draft auto` never asks the user to know whether speculation pays. It decides in three stages:

    calibrate   before the prompts: time a plain step and verifications at several lengths, fit the
                cost model's constants to them (`cost_model.fit`), time each candidate's draft step
    probe       the first rounds of decoding: a few with each candidate that could win, on the
                actual text; their tokens are output like any others
    follow      choose the candidate and gamma with the least predicted time per token; every few
                rounds look at the acceptance of the latest ones, and change gamma, down to 0

Few values of gamma are compiled (`GAMMAS`); a draft cache made for the largest serves them all.
A candidate that would not win at an acceptance of `OPTIMISTIC` is not even compiled, so that where
speculation cannot help, as with one short row, nothing is spent on it. Gamma 0 is final: plain
decoding does not write into the draft's cache, and the text would have to be read again.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cost_model import HARDWARE, Hardware, Timing, Workload, alpha_of, fit, omega, step
from drafters import Drafting
from kv_cache import POLICIES
from model import Transformer
from spec_decode import Engine, Stats

GAMMAS = (2, 5)  # compiled draft lengths
OPTIMISTIC = 0.95  # an acceptance that real text hardly exceeds
MARGIN = 1.03  # a predicted gain below this is not worth its risk
PROBE_DRAFTS = 200  # drafted tokens after which an acceptance is known well enough
FOLLOW = 8  # rounds between two looks at the acceptance


@dataclass(slots=True)
class Candidate:
    """A way to draft, what it costs, and how it did on this text."""

    drafting: Drafting
    draft_model: Transformer | None = None
    t_draft: float = 0.0  # T_D, seconds
    t_select: float = 0.0  # seconds of one selection
    select_every: int = 0  # rounds
    alpha: float | None = None  # acceptance; None: not probed

    def speedup(self, gamma: int, verify: dict[int, float]) -> float:
        """Predicted, over plain decoding; `verify` are the seconds of a verification by gamma."""
        share = self.t_select / self.select_every if self.select_every else 0.0
        seconds = gamma * self.t_draft + share + verify[gamma]
        alpha = OPTIMISTIC if self.alpha is None else self.alpha
        return verify[0] * omega(gamma, alpha) / seconds

    def best(self, verify: dict[int, float], least: float = MARGIN) -> tuple[float, int]:
        """The largest predicted speedup and its gamma; (1, 0), plain decoding, below `least`."""
        found = max((self.speedup(gamma, verify), gamma) for gamma in verify if gamma)
        return found if found[0] > least else (1.0, 0)

    def __str__(self) -> str:
        d = self.drafting
        who = "draft model, " if self.draft_model else ""
        return who + d.policy + (f" {d.budget}" if d.policy in POLICIES else "")


class Auto:
    """Decides for one engine; `prepare` before the prefill, `decode` instead of `decode`."""

    def __init__(
        self,
        engine: Engine,
        candidates: list[Candidate],  # with drafting.gamma the largest of gammas
        gammas: tuple[int, ...] = GAMMAS,
    ) -> None:
        self.engine, self.candidates, self.gammas = engine, candidates, gammas
        self.hardware: Hardware | None = None
        self.fit_error = 0.0
        self.residual: dict[int, float] = {}  # gamma -> measured / predicted
        self.chosen: Candidate | None = None
        self.gamma = 0
        self.predicted_speedup = 1.0

    def prepare(self) -> None:
        """Calibrate and time, compiling what could win. Writes into the empty caches."""
        engine, everyone = self.engine, self.candidates
        self.candidates = []
        self.calibrate()
        for c in everyone:
            if c.best(self.verify_seconds(engine.max_len))[1] == 0:
                continue  # not even if drafting cost nothing
            try:
                engine.use(c.drafting, c.draft_model)
            except ValueError:  # does not fit, or does not go with this length
                continue
            self.measure(c)
            if c.best(self.verify_seconds(engine.max_len))[1]:
                self.candidates.append(c)
        engine.use(Drafting())

    def calibrate(self) -> None:
        """Fit the cost model to plain steps and verifications of this batch at three lengths."""
        engine, config, timings = self.engine, self.engine.model.config, []
        engine.use(Drafting("ngram", max(self.gammas)))  # verifies with the full cache alone
        itemsize = engine.full.spec.dtype.itemsize
        for length in sorted({max(engine.max_len * n // 8, 2) for n in (1, 4, 8)}):
            engine.seq_len.fill_(length)
            for gamma in (0, *self.gammas):
                drafts = engine.tokens[:, :gamma]
                seconds = median_seconds(engine, lambda d=drafts: engine.verify(d))
                w = Workload(len(engine.rows), length, itemsize=itemsize)
                timings.append(Timing(w, gamma + 1, length, seconds))
        kind = "h200" if engine.rows.device.type == "cuda" else "cpu"
        self.hardware, self.fit_error = fit(config, HARDWARE[kind], timings)
        for gamma in (0, *self.gammas):
            self.residual[gamma] = statistics.median(
                t.seconds / step(config, self.hardware, t.workload, t.T).total
                for t in timings
                if gamma + 1 == t.T
            )

    def verify_seconds(self, length: int) -> dict[int, float]:
        """T_V by gamma, for this batch at that length; gamma 0 is T_T."""
        engine = self.engine
        w = Workload(len(engine.rows), length, itemsize=engine.full.spec.dtype.itemsize)
        config, hw = engine.model.config, self.hardware
        return {g: step(config, hw, w, g + 1).total * r for g, r in self.residual.items()}

    def measure(self, c: Candidate) -> None:
        """Time its draft step and its selection, and compile its verifications."""
        engine, drafter = self.engine, self.engine.drafter
        engine.seq_len.fill_(engine.max_len)
        drafter.prefill(0, 1)
        c.t_select = median_seconds(engine, drafter.select, 1)
        for gamma in self.gammas:
            engine.verify(engine.draft(gamma).tokens)
        c.t_draft = median_seconds(engine, lambda: engine.draft(max(self.gammas)))
        c.t_draft /= max(self.gammas)
        c.select_every = drafter.select_every

    def decode(self, on_round: Callable[[], None] = lambda: None) -> Stats:
        """Run rounds until every row is finished: probe, choose, follow."""
        self.rounds, self.on_round = 0, on_round
        length = int(self.engine.seq_len.float().mean())
        verify = self.verify_seconds(length)
        self.probe(verify)
        self.choose(verify)
        self.follow(verify)
        return self.engine.stats(self.rounds)

    def run(self, n: int, gamma: int) -> float | None:
        """Up to n rounds; the acceptance in them, None if nothing was drafted."""
        engine = self.engine
        accepted, drafted = engine.accepted.clone(), engine.drafted.clone()
        for _ in range(n):
            if engine.finished.all():
                break
            engine.round(gamma)
            self.rounds += 1
            every = engine.drafter.select_every if gamma else 0
            if every and self.rounds % every == 0:
                engine.drafter.select()
            self.on_round()
        n_rows = int((engine.drafted - drafted)[gamma])
        if not gamma or not n_rows:
            return None
        kept = (engine.accepted - accepted).tolist()
        return alpha_of(1 + sum(i * n for i, n in enumerate(kept)) / n_rows, gamma)

    def probe(self, verify: dict[int, float]) -> None:
        """A few rounds with each candidate that could still be the best one."""
        gamma = max(self.gammas)
        n = min(max(math.ceil(PROBE_DRAFTS / (gamma * len(self.engine.rows))), 2), 8)
        for c in self.candidates:
            c.alpha = None
        best = 1.0
        for c in sorted(self.candidates, key=lambda c: -c.best(verify)[0]):
            if c.best(verify)[0] > best:
                self.engine.use(c.drafting, c.draft_model)
                c.alpha = self.run(n, gamma)
                best = max(best, c.best(verify)[0])

    def choose(self, verify: dict[int, float]) -> None:
        """The candidate and gamma with the largest predicted speedup."""
        self.chosen, self.gamma, self.predicted_speedup = None, 0, 1.0
        for c in self.candidates:
            speedup, gamma = c.best(verify) if c.alpha is not None else (1.0, 0)
            if speedup > self.predicted_speedup:
                self.chosen, self.gamma, self.predicted_speedup = c, gamma, speedup
        c = self.chosen
        if c is None:
            self.engine.use(Drafting())
        elif self.engine.drafting is not c.drafting:
            self.engine.use(c.drafting, c.draft_model)

    def follow(self, verify: dict[int, float]) -> None:
        """Rounds to the end, with the gamma that the latest acceptance asks for."""
        gamma = self.gamma
        while not self.engine.finished.all():
            alpha = self.run(FOLLOW, gamma)
            if alpha is not None:
                self.chosen.alpha = (self.chosen.alpha + alpha) / 2
                gamma = self.chosen.best(verify, least=1.0)[1]

    def decision(self) -> dict:
        """The same for the JSON; seconds."""
        return {
            "predicted_speedup": self.predicted_speedup,
            "fit_error": self.fit_error,
            "candidates": [
                {"draft": str(c), "t_draft": c.t_draft, "t_select": c.t_select}
                | ({} if c.alpha is None else {"acceptance": c.alpha})
                for c in self.candidates
            ],
        }

    def explain(self) -> str:
        """The decision and the numbers behind it, in two lines."""
        length = int(self.engine.prompt_len.float().mean())
        verify = self.verify_seconds(length)
        steps = ", ".join(f"T_V({g}) {1e3 * t:.1f}" for g, t in verify.items() if g)
        seen = "; ".join(
            f"{c}: T_D {1e3 * c.t_draft:.1f} ms, "
            + ("could not win" if c.alpha is None else f"acceptance {c.alpha:.2f}")
            for c in self.candidates
        )
        what = f"{self.chosen}, gamma {self.gamma}" if self.chosen else "no draft"
        return (
            f"auto: {what}, predicted speedup {self.predicted_speedup:.2f}\n"
            f"      T_T {1e3 * verify[0]:.1f} ms, {steps} ms (fit within {self.fit_error:.0%}); "
            f"{seen or 'no candidate could win'}"
        )


def median_seconds(engine: Engine, work: Callable[[], object], repeats: int = 5) -> float:
    """Median time of the work, after one run of it that may compile."""

    def once() -> float:
        synchronize(engine)
        start = time.perf_counter()
        work()
        synchronize(engine)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(repeats))


def synchronize(engine: Engine) -> None:
    if engine.rows.device.type == "cuda":
        torch.cuda.synchronize(engine.rows.device)
