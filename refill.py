"""Batches that never wait: any number of requests through a fixed number of rows.

A batch of rows that begin together waits for its slowest one: at the end most rows do nothing. Here
a row that has ended is given the next request between two rounds of the others::

    row 0   r r a a a a a a . r r r e e e e e e e e        r reading a prompt
    row 1   r r r b b b . r d d d d d d d d d d d d        a, b, .. one request's rounds
    row 2   r c c c c c c c c c c . r r f f f f f f        . ended, and noticed

Nothing of that can be seen in a text: rows are independent, and so are their random numbers.

**Reading and rounds take turns**, because a device does one thing at a time. A prompt is read in
chunks, one prompt after the other. While rows run, reading stops in time for them to wait no longer
than `max_gap`, but it reads one chunk at least. While no row runs there is no need to stop.

**Beginnings are shared.** When a prompt's turn comes, what it has in common with the text of any
row is copied. So of many questions about one document, only the first reads the document. Not with
`--exact`: what would be copied depends on who ended first, and rounds may have written it.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from auto import Auto
from batch import Request
from device import synchronize, timed
from sampling import Stats
from spec_decode import SHARED, Engine


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request."""

    index: int  # of the request, in the order given
    request: Request
    token_ids: list[int]  # the new ones, with the one that ended them
    finish_reason: str  # "eos", "length" or "stop"
    stats: Stats  # of this request alone
    n_shared: int  # tokens of the prompt that needed no reading
    wait_seconds: float  # until its prompt's turn came
    first_token_seconds: float  # from then to its first token
    decode_seconds: float  # from then to its end


@dataclass(slots=True, eq=False)
class Row:
    """A request that has been given a row."""

    index: int
    request: Request
    given: float  # seconds, by the clock
    first: float | None = None  # when its first token was there; None: its prompt is being read
    n_shared: int = 0


@dataclass(eq=False)
class Refill:
    """Serves requests with an engine that was warmed up for refills; see the module docstring."""

    engine: Engine
    requests: Iterable[Request]  # taken one by one as rows become free; a sequence is checked first
    eos_ids: tuple[int, ...] = ()
    auto: Auto | None = None  # decides how to draft, if anything is left to decide
    max_gap: float = 2.0  # seconds that rows wait for other rows' prompts between two rounds
    longest_first: bool = False  # by prompt and limit, instead of in the order given
    share: float = SHARED  # see Engine.start
    on_round: Callable[[], None] = lambda: None  # called after every round, and forward of a prompt
    prefill_seconds: float = field(default=0.0, init=False)
    decode_seconds: float = field(default=0.0, init=False)
    longest_gap: float = field(default=0.0, init=False)  # seconds
    while_queued: Stats | None = field(default=None, init=False)  # until the last request was taken

    @torch.inference_mode()
    def results(self) -> Iterator[Result]:
        """One for each request, as they end. ValueError for one that the engine cannot serve."""
        engine = self.engine
        if isinstance(self.requests, Sequence):
            engine.check_requests(self.requests)
        self.queue: Iterator[tuple[int, Request]] = enumerate(self.requests)
        if self.longest_first:
            self.queue = iter(sorted(self.queue, key=lambda item: -item[1].n_tokens))
        self.rows: list[Row | None] = [None] * engine.batch.n_rows
        self.reading: tuple[Row, Iterator[None]] | None = None
        self.began, self.forward_seconds = time.perf_counter(), 0.0
        engine.begin(self.eos_ids)
        yield from self.fill()
        clock = time.perf_counter()
        for _ in self.auto.rounds() if self.auto else engine.rounds():
            ended = self.ended()
            if self.reading or (None in self.rows and not self.while_queued):
                synchronize(engine.device)
            self.decode_seconds += time.perf_counter() - clock
            self.on_round()
            yield from ended
            yield from self.fill()
            clock = time.perf_counter()

    def fill(self) -> Iterator[Result]:
        """Give free rows to requests and read their prompts, as long as running rows may wait."""
        waited = 0.0
        while self.reading or self.take():
            running = any(row and row.first for row in self.rows)
            if running and waited and waited + self.forward_seconds > self.max_gap:
                break
            self.read()
            self.on_round()
            if running:
                waited += self.forward_seconds
            yield from self.ended()
        self.longest_gap = max(self.longest_gap, waited)

    def take(self) -> bool:
        """Give a free row to the next request, if there are both."""
        if self.while_queued or None not in self.rows:
            return False
        index, request = next(self.queue, (-1, None))
        if request is None:
            self.while_queued = self.engine.batch.stats()
            return False
        self.engine.check_requests([request], first=index)
        b = self.rows.index(None)
        row = self.rows[b] = Row(index, request, time.perf_counter())
        self.reading = row, self.start(b, row)
        return True

    def start(self, b: int, row: Row) -> Iterator[None]:
        """Read its prompt; yields between two forwards."""
        share = math.inf if self.engine.full.spec.exact else self.share
        row.n_shared = yield from self.engine.start(b, row.request, share)

    def read(self) -> None:
        """One forward of the prompt that is being read."""
        assert self.reading
        row, forwards = self.reading
        self.forward_seconds, more = timed(
            self.engine.device, lambda: next(forwards, self) is not self
        )
        self.prefill_seconds += self.forward_seconds
        if not more:
            row.first, self.reading = time.perf_counter(), None

    def ended(self) -> list[Result]:
        """The results of rows that have ended, which are free then."""
        results = []
        for b, row in enumerate(self.rows):
            if row and row.first and (self.engine.watch.rows[b] or row.request.stop):
                result = self.result(b, row, row.first)
                results += [result] if result else []
        return results

    def result(self, b: int, row: Row, first: float) -> Result | None:
        """What row b has come to, None if it goes on. Copies to the host."""
        ids, request = self.engine.batch.output(b), row.request
        n = request.stop(ids) if request.stop else None
        if n is None and not self.engine.watch.rows[b]:
            return None
        reason = "stop" if n is not None else "eos" if ids[-1] in self.eos_ids else "length"
        self.engine.end(b)
        self.rows[b] = None
        times = row.given - self.began, first - row.given, time.perf_counter() - first
        stats = self.engine.batch.stats(b)
        return Result(row.index, request, ids[:n], reason, stats, row.n_shared, *times)

    def summary(self) -> dict:
        """Figures of the whole run: seconds, counts, and the share of rows that were busy.

        Busy is a row that decodes; rounds count until the last request was taken.
        """
        stats, queued = self.engine.batch.stats(), self.while_queued
        slots = queued.rounds * len(self.rows) if queued else 0
        return {
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "longest_gap_seconds": self.longest_gap,
            "rounds": stats.rounds,
            "row_rounds": stats.row_rounds,
            "decoded_tokens": stats.decoded_tokens,
            "busy_share": queued.row_rounds / slots if queued and slots else 1.0,
        }


def generate(
    engine: Engine,
    prompts: list[list[int]],  # any number of them
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
) -> tuple[list[list[int]], Stats]:
    """Continue prompts with the engine's own drafter and sampling: new tokens, and the counts.

    ValueError for prompts and limits that do not fit the engine.
    """
    requests = engine.requests(prompts, [max_new_tokens] * len(prompts))
    results = sorted(
        Refill(engine, requests, eos_ids, max_gap=float("inf")).results(), key=lambda r: r.index
    )
    return [r.token_ids for r in results], engine.batch.stats()
