"""A file of prompts through rows that are refilled: `generate.py --prompts IN --output OUT`.

    check IN (offline.py) | lock OUT, see what is done (results.py) | load the model (load.py)
    warm up | plain decoding, if it is compared with | a line of OUT whenever a request has ended

Whatever can be refused is refused before the weights are read, and a file that is done needs none.
What ends a run early, a Ctrl-C or a full disk, leaves a file from which the same command goes on.

How far it is, standard error is told: a terminal in one line that is rewritten, a log in a line now
and then. With --compare the same requests are first decoded plainly, through the same rows, and
nothing of that is written.
"""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

from auto import Auto
from batch import Request
from data_parallel import SharedOutput
from device import dtype_name, peak_memory_bytes, timed
from load import Opened, describe, how, make_engine, open_all
from measure import acceptance, setting, warm_up
from offline import BadLines, Defaults, Input, Line, answer_text, read_input
from options import Options, write_result
from parallel import check_same
from refill import Refill, Result
from report import Served, leg, progress_line, served_numbers, served_table
from results import VERSION, Output, fingerprint, open_output, open_shared
from sampling import Sampling, widest
from spec_decode import Engine

ROWS = 16  # at most, unless a flag says otherwise
WAIT = 0.3  # seconds between two looks at what other processes have left
SHOW, LOG = 1.0, 30.0  # seconds between two states of a terminal's line, and two lines of a log
TEXT_FLAGS = ("max_new_tokens", "seed", "ignore_eos", "chat", "system")  # that texts depend on
DRAFT_FLAGS = ("draft", "speculate_k", "draft_budget", "n_sink", "obs_window", "reselect_every")


def serve(o: Options) -> int:
    """The command; returns the exit status. OSError or ValueError for what cannot be used."""
    assert o.prompts and o.output
    say = partial(print, file=sys.stderr if o.json == "-" else sys.stdout, flush=True)
    sampling, opened = Sampling(o.temperature, o.top_k, o.top_p), open_all(o)
    defaults = Defaults(o.max_new_tokens, sampling, o.seed, opened.max_context, o.system)
    given = read_input(o.prompts, opened.checkpoint, defaults)
    if given.bad and not o.skip_bad:
        raise BadLines(given.path, given.bad)
    check_same("what the prompts say", given.sha256)
    writes = partial(open_output, kind=SharedOutput) if o.data_parallel else open_shared
    with writes(o.output, given, manifest(o, opened, given, sampling)) as output:
        lines = [line for line in given.lines if line.id not in output.done]
        result: dict = {
            "requests": len(given.lines),
            "bad_lines": len(given.bad),
            "done_before": len(output.done),
        }
        if given.bad:
            say(f"{len(given.bad)} lines of {o.prompts} cannot be used; {o.output} says why")
        if output.done:
            say(f"{len(output.done)} of {len(given.lines)} requests are done already")
        try:
            if lines:
                result |= run(o, opened, lines, output, say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"; {len(output.done)} of {len(given.lines)} requests are done, and the same "
                f"command goes on from there"
            ) from None
    try:
        if "plan" in result:
            say(served_table(result))
    finally:  # also where nobody reads standard output any more
        write_result(o, result)
    return 1 if o.check_lossless and not result.get("identical", True) else 0


def manifest(o: Options, opened: Opened, given: Input, sampling: Sampling) -> dict:
    """What the answers depend on, and how they are drafted."""
    flags = {name: getattr(o, name) for name in TEXT_FLAGS}
    flags |= {"exact": True} if o.exact else {}
    draft = {name: getattr(o, name) for name in DRAFT_FLAGS}
    if o.draft_checkpoint_path:
        draft["checkpoint_sha256"] = fingerprint(o.draft_checkpoint_path)
    return {
        "version": VERSION,
        "checkpoint": str(o.checkpoint_path),
        "checkpoint_sha256": fingerprint(o.checkpoint_path),
        "input": str(o.prompts),
        "input_sha256": given.sha256,
        "dtype": dtype_name(opened.dtype),
        "kv_dtype": dtype_name(opened.kv_dtype),
        "sampling": asdict(sampling),
        **flags,
        "strategy": draft,
    }


def run(
    o: Options, opened: Opened, lines: list[Line], output: Output, say: Callable[..., None]
) -> dict:
    """Answer these lines, writing each answer; what the JSON says of it."""
    engine, auto = prepare(o, opened, [line.request for line in lines], say)
    plain: dict[int, list[int]] = {}  # tokens by request
    differing: list[str] = []  # ids

    def write(r: Result, lines: list[Line] = lines) -> None:
        line = lines[r.index]
        output.append(record(line, r, opened))
        if o.compares and plain[r.index] != r.token_ids:
            differing.append(line.id)

    requests, longest_first = [line.request for line in lines], o.order == "longest"
    max_gap = o.max_gap or Refill.max_gap

    def answer(
        auto: Auto | None,
        use: Callable[[Result], object],
        title: str = "",
        queue: Iterable[Request] | None = None,  # None: all of them
    ) -> dict:
        longest = longest_first and queue is None
        queue = requests if queue is None else queue
        refill = Refill(engine, queue, opened.end_ids, auto, max_gap, longest)
        return figures(refill, requests, use, title)

    baseline = None
    if o.compares:
        drafter = engine.drafter
        engine.switch(None)
        baseline = answer(None, lambda r: plain.update({r.index: r.token_ids}), "plainly: ")
        engine.switch(drafter)
    if isinstance(output, SharedOutput):
        ordered = sorted(lines, key=lambda line: -line.request.n_tokens * longest_first)
        main = share(output, ordered, lambda queue, mine: answer(
            auto, partial(write, lines=mine), queue=queue))  # fmt: skip
    else:
        main = answer(auto, write)
    if not main:  # others have done it all
        return {}
    if auto:
        say(auto.explain())
    result = setting(engine, auto) | {"peak_memory_bytes": peak_memory_bytes(engine.device)}
    result[leg(result["plan"])] = main
    return result if baseline is None else result | compared(main, baseline, differing)


def share(
    output: SharedOutput,
    lines: list[Line],
    answer: Callable[[Iterable[Request], list[Line]], dict],
) -> dict:
    """Answer what no other process does, until all is written; the figures of the first pass.

    After that, requests may be left that somebody had claimed and died with.
    """
    first: dict = {}
    while output.missing(lines):
        mine: list[Line] = []

        def claimed(mine: list[Line] = mine) -> Iterator[Request]:
            for line in output.claims(lines):
                mine.append(line)
                yield line.request

        queue = claimed()
        request = next(queue, None)
        if request is None:
            time.sleep(WAIT)
        else:
            numbers = answer(itertools.chain([request], queue), mine)
            first = first or numbers
    return first


def prepare(
    o: Options, opened: Opened, requests: list[Request], say: Callable[..., None]
) -> tuple[Engine, Auto | None]:
    """An engine for these requests, warmed up. Says what it is and how long that took."""
    samplings = dict.fromkeys(request.sampling for request in requests)
    sampling, several = widest(samplings), len(samplings) > 1
    n_processes = int(os.environ.get("WORLD_SIZE", "1")) if o.data_parallel else 1
    n_rows = min(o.batch_size or ROWS, -(-len(requests) // n_processes))
    n_tokens = [r.n_tokens for r in requests]
    engine, auto = make_engine(o, opened, n_rows, max(n_tokens), sampling)
    lengths, limit = [len(r.prompt) for r in requests], max(r.max_new_tokens for r in requests)
    what = (
        f"{len(requests)} prompts of {min(lengths)} to {max(lengths)} tokens through {n_rows} "
        f"rows, up to {limit} new ones each, {'each as it asks' if several else how(sampling)}"
    )
    say(describe(o, engine, auto, what))
    say("compiling" if engine.model.compiled else "warming up", end=" ... ")
    say(f"{timed(engine.device, lambda: warm_up(engine, auto, refills=True))[0]:.1f} s")
    return engine, auto


def figures(
    refill: Refill, requests: Sequence[Request], use: Callable[[Result], object], title: str
) -> dict:
    """Serve these requests, and use each result when it is there; the figures of that."""
    ticker, results = Ticker(refill.engine, requests, title), []
    refill.on_round = ticker.tick
    began = time.perf_counter()
    try:
        for result in refill.results():
            use(result)
            ticker.count(result)
            results.append(result)
    finally:
        ticker.close()
    return served_numbers(
        Served(
            refill.summary() | {"seconds": time.perf_counter() - began},
            [len(r.token_ids) for r in results],
            [r.first_token_seconds for r in results],
            [r.decode_seconds for r in results],
            acceptance(refill.engine.batch.stats()),
        )
    )


def compared(main: dict, baseline: dict, differing: list[str]) -> dict:
    """What a plain pass over the same requests adds to the JSON."""
    result: dict = {"baseline": baseline, "identical": not differing}
    if differing:
        result["differing_ids"] = differing
    if main["decoded_tokens"]:  # else the prefill has decided everything
        for key, rate in {"speedup": "decode_tokens_per_second",
                          "total_speedup": "tokens_per_second"}.items():  # fmt: skip
            result[key] = main[rate] / baseline[rate]
    return result


def record(line: Line, r: Result, opened: Opened) -> dict:
    """The line of the output for a result."""
    stats, tokenizer = r.stats, opened.checkpoint.tokenizer
    drafted = {
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
    }
    return {
        "id": line.id,
        "line": line.number,
        "text": answer_text(tokenizer, line.request, r.token_ids, opened.end_ids),
        "token_ids": r.token_ids,
        "finish_reason": r.finish_reason,
        "prompt_tokens": len(line.request.prompt),
        "shared_tokens": r.n_shared,
        "rounds": stats.rounds,
        **(drafted if stats.drafts else {}),
        "wait_seconds": r.wait_seconds,
        "first_token_seconds": r.first_token_seconds,
        "decode_seconds": r.decode_seconds,
    }


class Ticker:
    """Tells standard error how far a pass is: a terminal's line is rewritten, a log gets more."""

    def __init__(self, engine: Engine, requests: Sequence[Request], title: str) -> None:
        self.engine, self.title, self.live = engine, title, sys.stderr.isatty()
        self.total, self.limits = len(requests), sum(r.max_new_tokens for r in requests)
        self.done = self.new = self.allowed = 0  # results, their tokens, and the most of them
        self.began = self.last = time.perf_counter()

    def count(self, result: Result) -> None:
        """One more is done."""
        self.done += 1
        self.new += len(result.token_ids)
        self.allowed += result.request.max_new_tokens

    def tick(self) -> None:
        """Say it, if the last time was long ago: what it asks for stops the device."""
        now = time.perf_counter()
        if now - self.last < (SHOW if self.live else LOG):
            return
        self.last = now
        stats, seconds = self.engine.batch.stats(), now - self.began
        expected = self.limits * self.new / max(self.allowed, 1)  # tokens, as rows end so far
        line = progress_line(self.done, self.total, {
            "busy": int((~self.engine.batch.finished).sum()),
            "tokens_per_second": stats.decoded_tokens / seconds,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "seconds_left": seconds * max(expected / max(stats.decoded_tokens, 1) - 1, 0),
        })  # fmt: skip
        self.say(self.title + line)

    def say(self, line: str) -> None:
        """Write the line, or over the last one."""
        if self.live:
            line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        print(line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave a terminal's line empty for what comes next."""
        if self.live:
            self.say("")
