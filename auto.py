"""Decide how to draft, from measured steps, a probe of acceptance, and what happens then.

`--draft auto` never asks the user to know whether speculation pays. It decides in three stages:

    calibrate   before the prompts: time a plain step and verifications at several lengths, fit the
                cost model's constants to them (`roofline.fit`), time each candidate's draft step
    probe       the first rounds of decoding: a few with each candidate that could win, on the
                actual text; their tokens are output like any others. Prompt lookup needs none:
                what it would have proposed can be held against the text that is there
    follow      use the candidate and gamma with the least predicted time per token; every few
                rounds look at the acceptance of the latest ones, and change either, down to none

Few values of gamma are compiled (`draft_lengths`); the largest one's draft cache serves them all.
A candidate that would not win at an acceptance of `OPTIMISTIC`, by its measured draft step, is not
probed, and a probe puts few tokens at stake. A draft that the user named is used in any case: only
its gamma is chosen. The choice follows the clock, so that with sampling a seed fixes the output
only together with a fixed `--draft` and `--speculate_k`.
"""

import fcntl
import math
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat, zip_longest
from pathlib import Path

import torch

from checkpoint import write_json
from config import open_json
from device import median_seconds
from drafters import Drafter, lookup
from model import Transformer
from policies import POLICIES, Strategy
from roofline import HARDWARE, Hardware, Timing, Workload, fit, forward_time
from sampling import Draft, Stats
from spec_decode import Engine

GAMMAS = (2, 5)  # compiled draft lengths on the CPU
OPTIMISTIC = 0.95  # an acceptance that real text hardly exceeds
MARGIN = 1.03  # a predicted gain below this is not worth its risk
PROBE_DRAFTS = 200  # drafted tokens after which an acceptance is known well enough
PROBE_SHARE = 0.04  # of the rounds still to come, at most, for probing each candidate
HOPE = 0.05  # the chance that a candidate not yet probed is as good as OPTIMISTIC
FOLLOW = 4  # rounds between two looks at the acceptance
STAY = 1.05  # what another candidate must gain over the one in use
SWEEPS = 3  # of a calibration over its points: a shared machine is slow for a while, then fast
STILL_TRUE = 0.15  # a kept calibration may be off by so much before it is done again
MEMORY = 16  # rounds of a row: what all earlier ones count for, at most, when new ones are seen


@dataclass(slots=True)
class Candidate:
    """A way to draft, what it costs, and how it did on this text."""

    strategy: Strategy
    draft_model: Transformer | None = None
    t_draft: float = 0.0  # T_D, seconds
    t_select: float = 0.0  # seconds of one selection
    select_every: int = 0  # rounds
    alpha: float | None = None  # acceptance where no place in `places` has its own; None: unknown
    seen: float = 0.0  # rounds of a row that it rests on
    places: tuple[tuple[float, float], ...] = ()  # of a round's drafts: how often judged, and kept
    probed: "Candidate | None" = None  # a copy, from when the first choice was made

    @property
    def is_lookup(self) -> bool:
        return self.strategy.policy == "ngram"

    def saw(self, accepted: list[int], drafted: list[int], memory: int = MEMORY) -> None:
        """Take in rounds of a row: how many kept n drafts, and how many had n, at index n.

        A draft is judged if all before it were kept. Each place in the round has a rate of its
        own, because acceptance comes in runs: where four drafts were kept, the fifth mostly is.
        All earlier rounds together count for `memory` rounds at most.
        """
        if not any(accepted):
            return
        before = min(self.seen, memory)
        share = before / self.seen if self.seen else 0.0
        old = [(share * judged, share * kept) for judged, kept in self.places]
        new = []
        for i in range(1, len(accepted)):
            reached, kept = sum(accepted[i - 1 :]), sum(accepted[i:])
            room = sum(drafted[i:]) / max(sum(drafted[i - 1 :]), 1)  # of those, had an i-th draft
            new.append((max(reached * room, kept), kept))
        pairs = zip_longest(old, new, fillvalue=(0.0, 0.0))
        self.places = tuple((a + c, b + d) for (a, b), (c, d) in pairs)
        self.seen = before + sum(accepted)
        judged, kept = map(sum, zip(*self.places, strict=True))
        self.alpha = kept / judged if judged else self.alpha

    def tokens(self, gamma: int) -> float:
        """Expected of a round, the target's own included.

        A place of which less than one round is known goes like the place before it.
        """
        rate = OPTIMISTIC if self.alpha is None else self.alpha
        reached = total = 1.0
        for judged, kept in islice(chain(self.places, repeat((0.0, 0.0))), gamma):
            rate = kept / judged if judged >= 1 else rate
            reached *= rate
            total += reached
        return total

    def acceptance(self, gamma: int) -> float:
        """Expected accepted / drafted tokens, the figure that the report has."""
        return (self.tokens(gamma) - 1) / gamma

    def steps(self, gamma: int, verify: dict[int, float]) -> float:
        """What a round takes, in plain steps; `verify` are the seconds to verify, by gamma."""
        share = self.t_select / self.select_every if self.select_every else 0.0
        return (gamma * self.t_draft + share + verify[gamma]) / verify[0]

    def speedup(self, gamma: int, verify: dict[int, float]) -> float:
        """Predicted, over plain decoding."""
        return self.tokens(gamma) / self.steps(gamma, verify)

    def best(self, verify: dict[int, float], least: float = MARGIN) -> tuple[float, int]:
        """The largest predicted speedup and its gamma; (1, 0), plain decoding, below `least`."""
        found = max((self.speedup(gamma, verify), gamma) for gamma in verify if gamma)
        return found if found[0] > least else (1.0, 0)

    def __str__(self) -> str:
        d = self.strategy
        who = "draft model, " if self.draft_model else ""
        return who + d.policy + (f" {d.budget}" if d.policy in POLICIES else "")


Choice = tuple[Candidate | None, int, float]  # who drafts, gamma, predicted speedup


class Auto:
    """Decides for one engine: `prepare` before the prefill, `decode` after it."""

    def __init__(
        self,
        engine: Engine,
        candidates: list[Candidate],  # with drafting.gamma the largest of gammas
        gammas: tuple[int, ...] = GAMMAS,
        named: bool = False,  # the candidate was asked for: it drafts from the first round on
    ) -> None:
        self.engine, self.candidates, self.gammas = engine, list(candidates), gammas
        self.named, self.least = named, 0.0 if named else MARGIN  # predicted speedup to draft at
        self.hardware: Hardware | None = None
        self.fit_error = 0.0
        self.residual: dict[int, float] = {}  # gamma -> measured / predicted
        self.current: Candidate | None = None  # whom the engine drafts with,
        self.drafter: Drafter | None = None  # and what that made of it
        self.verifications: dict[int, Callable[[], object]] = {}  # by gamma, captured
        self.dropped: list[str] = []  # who was not considered any further, and why
        self.chosen: Candidate | None = None
        self.gamma = 0
        self.predicted_speedup = 1.0  # of chosen and gamma, the decision after the probe
        self.verify: dict[int, float] = {}  # the `verify_seconds` that it was made with
        self.on_round: Callable[[], None] = lambda: None  # called after every round
        self.last = ""  # what was used when the last row finished

    def prepare(self) -> None:
        """Calibrate and time, compiling what could win. Writes into the empty caches.

        ValueError if a draft that was asked for by name cannot be.
        """
        for c in list(self.candidates):
            if self.install(c):
                self.measure(c)
        self.calibrate()
        verify = self.verify_seconds(self.engine.max_len)
        for c in list(self.candidates):
            if not c.best(verify, self.least)[1]:
                self.drop(c, f"T_D {1e3 * c.t_draft:.1f} ms, could not win")
        self.install(self.candidates[0] if len(self.candidates) == 1 else None)

    def drop(self, c: Candidate, why: str) -> None:
        """Consider it no further."""
        self.candidates = [other for other in self.candidates if other is not c]
        self.dropped.append(f"{c}: {why}")

    def install(self, c: Candidate | None) -> bool:
        """Make the engine draft like this from here on; nothing to do if it does already.

        False, and it is dropped, if it does not go with this length, or does not fit: memory that
        was free may not be any more.
        """
        try:
            if c is not self.current or self.engine.drafter is not self.drafter:
                self.engine.use(*((c.strategy, c.draft_model) if c else (Strategy(),)))
        except ValueError as e:
            if self.named:
                raise
            self.drop(c, str(e))
            return False
        self.current, self.drafter = c, self.engine.drafter
        return True

    def calibrate(self) -> None:
        """Fit the cost model to forwards of this batch.

        They are plain steps and verifications at three lengths, and the draft steps of candidates
        that draft with the model's own weights. The fit is kept in a file, by device, model, dtype,
        versions and batch. It is taken from there if a plain step still takes as long as it says:
        shared machines change.
        """
        engine, path, key = self.engine, calibration_file(), self.key()
        engine.use(Strategy("ngram", max(self.gammas)))  # verifies with the full cache alone
        if self.load(kept_calibrations(path).get(key)):
            now = self.time(0, engine.max_len).seconds
            if abs(now / self.verify_seconds(engine.max_len)[0] - 1) < STILL_TRUE:
                return
        lengths = sorted({max(engine.max_len * n // 8, 2) for n in (1, 4, 8)})
        points = [(gamma, n) for n in lengths for gamma in (0, *self.gammas)]
        sweeps = [[self.time(*point) for point in points] for _ in range(SWEEPS)]
        timings = [
            replace(same[0], seconds=statistics.median(t.seconds for t in same))
            for same in zip(*sweeps, strict=True)
        ]
        drafts = [
            Timing(timings[-1].workload, 1, min(c.strategy.budget, engine.max_len), c.t_draft)
            for c in self.candidates
            if c.t_draft and c.draft_model is None and not c.is_lookup
        ]
        kind = "h200" if engine.device.type == "cuda" else "cpu"
        config = engine.model.config
        self.hardware, self.fit_error = fit(config, HARDWARE[kind], timings + drafts)
        for gamma in (0, *self.gammas):
            self.residual[gamma] = statistics.median(
                t.seconds / forward_time(config, self.hardware, t.workload, t.T).total
                for t in timings
                if gamma + 1 == t.T
            )
        entry = {"hardware": asdict(self.hardware), "fit_error": self.fit_error}
        entry["residual"] = list(self.residual.items())
        with suppress(OSError, RecursionError):  # nowhere to keep it
            keep_calibration(path, key, entry)

    def time(self, gamma: int, length: int) -> Timing:
        """A verification of gamma drafts and what is decided by it, all rows of this length."""
        engine = self.engine
        engine.batch.seq_len.fill_(length)
        if gamma not in self.verifications:
            draft = Draft(engine.batch.tokens[:, :gamma], None)
            if not engine.sampling.greedy:  # accepting reads them, whatever they are
                V = engine.model.config.vocab_size
                probs = torch.full((*draft.tokens.shape, V), 1 / V, device=engine.device)
                draft = draft._replace(probs=probs)
            self.verifications[gamma] = engine.capture(lambda: engine.decide(draft))
        seconds = median_seconds(engine.device, self.verifications[gamma])
        w = Workload(engine.batch.n_rows, length, itemsize=engine.full.spec.dtype.itemsize)
        return Timing(w, gamma + 1, length, seconds)

    def key(self) -> str:
        """What a calibration depends on."""
        engine, model = self.engine, self.engine.model
        device = engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        parts = (
            name, torch.get_num_threads(), torch.__version__, model.compiled, self.gammas,
            model.config, engine.full.spec.dtype, engine.sampling, engine.batch.n_rows,
            engine.max_len,
        )  # fmt: skip
        return " ".join(map(str, parts))

    def load(self, entry: object) -> bool:
        """Take over a kept calibration; False if it is not one, or one of another version."""
        try:
            hardware = Hardware(**entry["hardware"])
            residual = dict(map(tuple, entry["residual"]))
            numbers = [v for name, v in entry["hardware"].items() if name != "name"]
            numbers += [*residual.values(), 1 + entry["fit_error"]]
            if residual.keys() != {0, *self.gammas} or not all(1e-30 < v < 1e30 for v in numbers):
                return False
        except (KeyError, TypeError, ValueError):
            return False
        self.hardware, self.fit_error, self.residual = hardware, entry["fit_error"], residual
        return True

    def verify_seconds(self, length: int) -> dict[int, float]:
        """T_V by gamma, for this batch at that length; gamma 0 is T_T."""
        engine = self.engine
        w = Workload(engine.batch.n_rows, length, itemsize=engine.full.spec.dtype.itemsize)
        config, hw = engine.model.config, self.hardware
        return {g: forward_time(config, hw, w, g + 1).total * r for g, r in self.residual.items()}

    def measure(self, c: Candidate) -> None:
        """Time its draft step and its selection, and compile what it runs."""
        engine, drafter = self.engine, self.engine.drafter
        engine.warm_up_rounds()
        engine.batch.seq_len.fill_(engine.max_len)
        c.t_select = median_seconds(engine.device, drafter.select, 1)
        for gamma in self.gammas:
            engine.decide(engine.draft(gamma))
        draft = engine.capture(lambda: engine.draft(max(self.gammas)))
        c.t_draft = median_seconds(engine.device, draft) / max(self.gammas)
        c.select_every = drafter.select_every

    def decode(self, on_round: Callable[[], None] = lambda: None) -> Stats:
        """Run rounds until every row is finished: probe, choose, follow."""
        self.on_round = on_round
        self.verify = verify = self.verify_now()
        self.probe(verify)
        for c in self.candidates:
            if c.is_lookup:  # now there is some new text to judge by
                self.look_back(c)
            c.probed = replace(c, probed=None)
        self.chosen, self.gamma, self.predicted_speedup = self.choose(verify)
        self.follow()
        return self.engine.batch.stats()

    def verify_now(self) -> dict[int, float]:
        return self.verify_seconds(int(self.engine.batch.seq_len.float().mean()))

    def run(self, n: int, gamma: int) -> tuple[list[int], list[int]]:
        """Up to n rounds; how often a row kept 0, 1, .. gamma drafts in them, and had so many."""
        counts = torch.stack((self.engine.batch.accepted, self.engine.batch.drafted))
        self.engine.run(gamma, n, self.on_round)
        counts = torch.stack((self.engine.batch.accepted, self.engine.batch.drafted)) - counts
        accepted, drafted = counts[:, : gamma + 1].tolist()
        return accepted, drafted

    def probe(self, verify: dict[int, float]) -> None:
        """A few rounds with each candidate that could still be the best one.

        At most PROBE_SHARE of the tokens still to come are at stake, less than the candidate may
        be hoped to save on them, and one that is hopeless after a quarter of its rounds has no
        more of them. Prompt lookup needs no rounds. A draft that was asked for by name has them
        in any case.
        """
        engine, gamma = self.engine, max(self.gammas)
        to_come = float((engine.batch.limit - engine.batch.seq_len).float().mean())
        n = math.ceil(PROBE_DRAFTS / (gamma * engine.batch.n_rows) / 4)
        n = max(min(n, int(PROBE_SHARE * to_come / 4)), 1)
        for c in self.candidates:
            c.alpha, c.seen, c.places = None, 0.0, ()
            if c.is_lookup:
                self.look_back(c)
        best = max([1.0, *(c.best(verify)[0] for c in self.candidates if c.alpha is not None)])
        for c in sorted(self.candidates, key=lambda c: -c.best(verify)[0]):
            saved = to_come / best - to_come / c.best(verify)[0]  # in plain steps, at its best
            hopeless = HOPE * saved < n * (c.steps(gamma, verify) - 1)
            if c.is_lookup or (hopeless and not self.named) or not self.install(c):
                continue
            for _ in range(4):
                c.saw(*self.run(n, gamma))
                if c.best(verify, least=0.9 * best)[1] == 0:
                    break
            best = max(best, c.best(verify)[0])

    def look_back(self, lookup: Candidate) -> None:
        """Prompt lookup's acceptance, from the text that is there."""
        lookup.saw(*lookup_rounds(self.engine, max(self.gammas)), memory=0)

    def choose(self, verify: dict[int, float], stay: float = 1.0) -> Choice:
        """Draft from here on as has the largest predicted speedup: who, gamma, and that speedup.

        `stay` is what another candidate must gain over the one in use.
        """
        while True:
            options: list[Choice] = [] if self.named else [(None, 0, 1.0)]
            for c in self.candidates:
                speedup, gamma = c.best(verify, self.least)
                if gamma and (self.named or c.alpha is not None):
                    options.append((c, gamma, speedup))
            best = max(options, key=lambda o: o[2] * (stay if o[0] is self.current else 1.0))
            if self.install(best[0]):
                return best

    def follow(self) -> None:
        """Rounds to the end, with what the latest acceptance asks for.

        Older rounds count less (MEMORY). What prompt lookup would have had accepted is seen in the
        text itself. A draft that was given up is tried again after a pause, longer every time.
        """
        engine, c, gamma = self.engine, self.chosen, self.gamma
        idle, pause = 0, 8 * FOLLOW
        watching = any(other.is_lookup for other in self.candidates)
        while True:
            self.last = self.describe(c, gamma)
            n = FOLLOW if gamma or watching else pause
            seen = self.run(n, gamma)
            if engine.batch.finished.all():
                return
            idle = 0 if gamma else idle + n
            if gamma:
                c.saw(*seen)
            for other in self.candidates:
                if other.is_lookup and other is not self.current:
                    self.look_back(other)
                elif idle >= pause:
                    other.alpha, other.places = other.probed.alpha, other.probed.places
                    other.seen = 0.0  # what is seen now counts alone
            if idle >= pause:
                idle, pause = 0, 2 * pause
            c, gamma, _ = self.choose(self.verify_now(), STAY)

    @staticmethod
    def describe(c: Candidate | None, gamma: int) -> str:
        return f"{c}, gamma {gamma}" if gamma else "no draft"

    def foreseen(self, c: Candidate) -> dict:
        """The acceptance that the first choice was made with, at the gamma best for it."""
        if c.probed is None or c.probed.alpha is None:
            return {}
        _, gamma = c.probed.best(self.verify, least=0.0)
        return {"gamma": gamma, "acceptance": c.probed.acceptance(gamma)}

    def decision(self) -> dict:
        """What was decided first, and by which numbers, for the JSON; seconds."""
        return {
            "predicted_speedup": self.predicted_speedup,
            "at_the_end": self.last,
            "fit_error": self.fit_error,
            "dropped": self.dropped,
            "verify_seconds": self.verify,
            "candidates": [
                {"draft": str(c), "t_draft": c.t_draft, "t_select": c.t_select} | self.foreseen(c)
                for c in self.candidates
            ],
        }

    def explain(self) -> str:
        """The decision and the numbers behind it, in two lines."""
        steps = [f"T_V({g}) {1e3 * t:.1f}" if g else f"T_T {1e3 * t:.1f} ms"
                 for g, t in self.verify.items()]  # fmt: skip
        about = []
        for c in self.candidates:
            seen = self.foreseen(c)
            words = "acceptance {acceptance:.2f} at gamma {gamma}" if seen else "not probed"
            about.append(f"{c}: T_D {1e3 * c.t_draft:.1f} ms, {words.format(**seen)}")
        named = " (the draft as asked)" if self.named else ""
        return (
            f"auto: {self.describe(self.chosen, self.gamma)}{named}, "
            f"predicted speedup {self.predicted_speedup:.2f}; at the end {self.last}\n"
            f"      {', '.join(steps)} ms (fit within {self.fit_error:.0%}); "
            f"{'; '.join(about + self.dropped)}"
        )


def lookup_rounds(engine: Engine, gamma: int) -> tuple[list[int], list[int]]:
    """How often prompt lookup would have kept 0, 1, .. gamma drafts, and had so many, in the rounds
    that it would have taken for the last tokens of all rows that are not finished.
    """
    n = min(max(64 // engine.batch.n_rows, 4), 12)  # tokens per row
    back = torch.arange(gamma + n - 1, gamma - 1, -1, device=engine.device)
    length = engine.batch.seq_len[:, None] - back  # [B, n]
    exists = length >= 2
    length = length.clamp_min(2).reshape(-1, 1)  # [B * n, 1]
    tokens = engine.batch.tokens.repeat_interleave(n, dim=0)
    actual = tokens.gather(1, length + torch.arange(gamma, device=length.device))
    same = lookup(tokens, length[:, 0], gamma) == actual
    kept = same.long().cumprod(dim=1).sum(dim=1).view(-1, n)
    kept = kept.masked_fill(~exists, -1)[~engine.batch.finished]
    histogram = [0] * (gamma + 1)
    for row in kept.tolist():
        i = row.count(-1)
        while i < n:
            histogram[row[i]] += 1
            i += row[i] + 1
    return histogram, [0] * gamma + [sum(histogram)]


def draft_lengths(device_type: str, n_group: int) -> tuple[int, ...]:
    """The values of gamma that are worth compiling, ascending; n_group is G, heads per KV head.

    On CUDA attention computes a tile of 16, 32 or 64 queries whatever G * (gamma + 1) is, so the
    most drafts that a tile has room for are free: up to 11, beyond which drafts are rarely kept.
    """
    if device_type != "cuda":
        return GAMMAS
    n_tokens = {2, 4} | {min(tile // n_group, 12) for tile in (16, 32, 64)}
    return tuple(sorted(n - 1 for n in n_tokens if n > 1))


def calibration_file() -> Path:
    """Where calibrations are kept; a path that cannot be a file where there is no place for them.

    XDG_CACHE_HOME is ignored if it is empty or relative, as its specification asks for.
    """
    try:
        home = Path("~/.cache").expanduser()
    except RuntimeError:  # no HOME, and nobody of this number in /etc/passwd: some containers
        home = Path(os.devnull)
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else home) / "magicdec.json"


def kept_calibrations(path: Path) -> dict:
    """The entries of the file by key; none if there is no file, or a broken one."""
    with suppress(OSError, ValueError, RecursionError):
        return open_json(path).of(dict)
    return {}


def keep_calibration(path: Path, key: str, entry: dict) -> None:
    """Add an entry to the file; of two processes that do so at once, neither loses its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(kept_calibrations(path) | {key: entry}, path)
