"""Refilled rows: every request gets the text that it gets alone, whatever runs beside it."""

import functools
import gc
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from auto import Auto, Candidate
from batch import Request
from kernels import compile_blocks
from kv_cache import CacheSpec
from model import Transformer
from policies import Strategy
from refill import Refill, Result
from sampling import RowSampling, Sampling, pick, widest
from spec_decode import Engine
from tests.reference import (
    COMPILED_BUDGET,
    COMPILED_CHUNK,
    plain_greedy,
    tiny_model,
)
from tests.test_drafters import ROOT, STRATEGIES
from tests.test_families import short_rings
from tests.test_spec_decode import compiled_engine, prompts_of

GREEDY, VOCAB = Sampling(), 31
SAMPLINGS = (
    GREEDY,
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_p=0.8),
    Sampling(0.9, top_k=9, top_p=0.9),
)
KINDS = {"all": {}, "windows": {"sliding_window": 11, "full_every": 2}}  # of a tiny model
LIMIT, SHARED = 14, 20  # most new tokens; tokens that are worth copying in these tests
MAX_LEN = 100 + LIMIT


@pytest.fixture(autouse=True)
def small_sizes(request, monkeypatch) -> Iterator[None]:
    """Prompts of 60 tokens take several chunks, and rings wrap."""
    if "compil" in request.node.name:
        yield
        return
    monkeypatch.setattr("model.SHORT", 7)
    with short_rings():
        yield


@functools.cache
def target(kind: str = "all") -> Transformer:
    return tiny_model(vocab_size=VOCAB, **KINDS[kind])


@functools.cache
def draft_model(context: int) -> Transformer:
    """Like the target, and often right: its weights, disturbed."""
    model, generator = tiny_model(vocab_size=VOCAB, max_seq_len=context), torch.Generator()
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator.manual_seed(p.numel()))
        p += 0.25 * p.std() * noise if p.dim() > 1 else 0
    return model


@functools.cache
def prompts() -> list[list[int]]:
    """Of 1 to 96 tokens; some begin like others, some are whole beginnings of others."""
    stems = prompts_of([70, 45, 29, 3], VOCAB, seed=3)
    ends = prompts_of([1, 4, 11, 26], VOCAB, seed=4)
    return [
        *stems,
        *([*stem, *end] for stem in stems for end in ends),
        *([*stem[:SHARED], *end] for stem in stems[:2] for end in ends),
        *prompts_of([1, 2, 30, 58, 59, 87, 88], VOCAB, seed=5),
    ]


def stop_at(token: int):
    """The answer ends before this token."""
    return lambda tokens: tokens.index(token) if token in tokens else None


@functools.cache
def continuation(
    model: Transformer, prompt: tuple[int, ...], sampling: Sampling, seed: int
) -> list[int]:
    """LIMIT new tokens by the model's own uncached forward, one at a time."""
    row = RowSampling(
        torch.tensor([sampling.temperature]), torch.tensor([sampling.top_k or 0]),
        torch.tensor([1.0 if sampling.top_p is None else sampling.top_p]), torch.tensor([seed]),
    )  # fmt: skip
    tokens = [*prompt]
    for place in range(len(prompt), len(prompt) + LIMIT):
        logits = model(torch.tensor([tokens]), torch.arange(place)[None])[:, -1:]
        tokens.append(int(pick(logits, torch.tensor([[place]]), row, sampling)))
    return tokens[len(prompt) :]


def alone(model: Transformer, request: Request, eos: Iterable[int]) -> tuple[list[int], str]:
    """The tokens that the request gets without an engine, and why they end."""
    if request.sampling.greedy:
        text = plain_greedy(model, request.prompt, request.max_new_tokens)
    else:
        text = continuation(model, tuple(request.prompt), request.sampling, request.seed)
    text = text[: request.max_new_tokens]
    ends = [i for i, token in enumerate(text) if token in eos]
    text = text[: ends[0] + 1] if ends else text
    cut = request.stop(text) if request.stop else None
    if cut is not None:
        return text[:cut], "stop"
    return text, "eos" if ends else "length"


def check(results: list[Result], requests: list[Request], model: Transformer, eos=()) -> None:
    """Each request has one result, with the text that it gets alone."""
    assert sorted(r.index for r in results) == [*range(len(requests))]
    for r in results:
        assert r.request is requests[r.index]
        assert (r.token_ids, r.finish_reason) == alone(model, r.request, eos), r
        assert 0 <= r.n_shared < len(r.request.prompt)


def random_request(rng: random.Random, samplings=SAMPLINGS, limit: int = LIMIT) -> Request:
    sampling, seed = rng.choice(samplings), rng.randrange(2)
    stop = stop_at(rng.randrange(VOCAB)) if rng.random() < 0.25 else None
    return Request(rng.choice(prompts()), rng.randint(1, limit), sampling, seed, stop)


def engine_of(rows: int, strategy: str, kind: str = "all", samplings=SAMPLINGS) -> Engine:
    policy, settings, context = STRATEGIES.get(strategy, ("none", {}, None))
    plan = Strategy(policy, 3, n_sink=3, **settings)
    draft = draft_model(context) if context else None
    return Engine(target(kind), rows, MAX_LEN, plan, widest(samplings), draft_model=draft)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["none", *STRATEGIES])
def test_whatever_comes_and_goes_a_request_gets_its_own_text(strategy, kind):
    """Random schedules: order, number of rows, neighbours, limits, ends, arrival, sampling.

    An engine is used for several of them, one after the other, and for some that are given up.
    """
    rng, n_copied, accepted = random.Random(f"{strategy} {kind}"), 0, Counter()
    for rows, samplings in ((1, SAMPLINGS), (3, SAMPLINGS), (4, (GREEDY,))):
        engine = engine_of(rows, strategy, kind, samplings)
        for _ in range(3):
            requests = [random_request(rng, samplings) for _ in range(rng.randint(1, 3 * rows))]
            eos = tuple(rng.sample(range(VOCAB), rng.randint(0, 2)))
            order = {"max_gap": rng.choice([0.0, 1e9]), "longest_first": rng.random() < 0.3}
            order["share"] = rng.choice([SHARED, SHARED, math.inf])
            refill = Refill(engine, iter(requests), eos, **order)
            results = [*refill.results()]
            check(results, requests, engine.model, eos)
            next(Refill(engine, requests).results())  # and the rest is given up
            n_copied += sum(r.n_shared > 0 for r in results)
            for r in results:
                accepted.update(dict(enumerate(r.stats.accepted_histogram)))
    assert n_copied
    assert strategy == "none" or (accepted[0] and accepted[1])  # or it would show little


@pytest.mark.parametrize("share", [SHARED, math.inf])  # reads short ends apart, or in a chunk
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_take_nothing_from_a_prompt_that_is_being_read(kind, share):
    """The last chunk is moved back to end with the prompt, and what it sees must still be there.

    Meanwhile rounds write behind what is read of it. The rings here hold a window and a chunk.
    """
    engine = engine_of(2, "ngram", kind, (GREEDY,))
    for n in (29, 30, 31, 32, 57, 58, 59, 60, 61, 88, 89):
        requests = [Request([1, 2, 3], LIMIT), Request(prompts_of([n], VOCAB)[0], 6)]
        results = [*Refill(engine, requests, max_gap=0.0, share=share).results()]
        check(results, requests, engine.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ngram", "streaming", "draft model, full"])
def test_no_draft_is_better_or_worse_for_its_neighbours(strategy, kind):
    """Those that select nothing by the round: drafters know a new row's text, and nothing else."""
    rng, single = random.Random(strategy), engine_of(1, strategy, kind)
    requests = [random_request(rng) for _ in range(12)]
    for max_gap in (0.0, 1e9):
        engine = engine_of(3, strategy, kind)
        for r in Refill(engine, requests, max_gap=max_gap, share=SHARED).results():
            (alone,) = Refill(single, [r.request], share=math.inf).results()
            assert r.stats == alone.stats


CHEAP, DEAR = {0: 1.0, 1: 1.0, 3: 1.1}, {0: 1.0, 1: 1.8, 3: 3.5}  # seconds by gamma


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_that_changes_with_the_clock_changes_no_text(monkeypatch, kind):
    """The clock says by chance that drafting is cheap or dear, so that strategies come and go."""
    rng, used = random.Random(1), set()
    engine = engine_of(3, "none", kind)
    names = ("ngram", "streaming", "snapkv")
    found = [Candidate(Strategy(p, 3, 24, 3, obs_window=7)) for p in names]
    auto = Auto(engine, found, (1, 3), refilled=True)
    monkeypatch.setattr(auto, "verify_seconds", lambda *_: rng.choice((CHEAP, DEAR)))
    for c in found:
        c.drafter = engine.add(c.strategy)
        c.t_draft = 0.02

    def note(c, *args, run=auto.run):
        used.add(str(c))
        kept = (row.kept for known in found for row in known.record.rows)
        assert all(min(row, default=0) >= 0 for row in kept)  # whoever began meanwhile
        return run(c, *args)

    monkeypatch.setattr(auto, "run", note)
    for _ in range(6):
        requests = [random_request(rng) for _ in range(8)]
        results = [*Refill(engine, requests, auto=auto, max_gap=0.0).results()]
        check(results, requests, engine.model)
    assert len(used) > 2


def test_a_choice_by_the_real_clock_changes_no_text():
    """Calibrated, with a draft that was named and so is used."""
    rng, engine = random.Random(8), engine_of(3, "none")
    auto = Auto(engine, [Candidate(Strategy("streaming", 3, 12, 3))], (1, 3), named=True)
    auto.calibrate(refills=True)
    for _ in range(2):
        requests = [random_request(rng) for _ in range(8)]
        results = [*Refill(engine, requests, auto=auto).results()]
        check(results, requests, engine.model)
        assert sum(r.stats.drafts for r in results) > 0


@pytest.mark.parametrize("samplings", [(GREEDY,), (GREEDY, Sampling(0.8, top_k=9))])
def test_nothing_compiles_again_whatever_comes_and_goes(samplings, monkeypatch):
    """Prompts around a chunk and a KV block, a shared beginning, greedy and sampled rows."""
    monkeypatch.setattr(CacheSpec, "prefill_chunk", COMPILED_CHUNK)
    model, eager = tiny_model(), tiny_model()
    compile_blocks(model)
    strategy = Strategy("streaming", 3, COMPILED_BUDGET, 3)
    engine = compiled_engine(model, strategy, widest(samplings))
    engine.warm_up(refills=True)
    (document,) = prompts_of([400])
    texts = prompts_of([490, 3, 127, 128, 129, 255, 256, 613, 1], seed=6)
    texts += [document + end for end in prompts_of([1, 60, 200], seed=7)]
    limits = [3 + 5 * i % 12 for i in range(len(texts))]
    requests = [
        Request(text, n, samplings[i % len(samplings)], i)
        for i, (text, n) in enumerate(zip(texts, limits, strict=True))
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        for max_gap in (0.0, 1e9):
            results = [*Refill(engine, requests, max_gap=max_gap).results()]
            check(results, requests, eager)
            assert any(r.n_shared for r in results)
            requests.reverse()


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """Grows by how many tokens of prompts every forward of one row reads."""
    counts, hidden = [], Transformer.hidden

    def counted(self, tokens: Tensor, *args):
        if len(tokens) == 1:
            counts.append(tokens.shape[1])
        return hidden(self, tokens, *args)

    monkeypatch.setattr(Transformer, "hidden", counted)
    return counts


@pytest.mark.parametrize("rows", [2, 6])  # some wait for a row; all start together
@pytest.mark.parametrize("kind", KINDS)
def test_a_common_document_is_read_once(rows, kind, tokens_read):
    """Where the ring of a window has lost the end of the document, it is read again."""
    (document,), ends = prompts_of([150], VOCAB), prompts_of([1, 4, 11, 3, 29, 7], VOCAB, seed=4)
    requests = [Request(document + end, 50) for end in ends]
    n_tokens, totals = sum(len(r.prompt) for r in requests), []
    for share in (SHARED, math.inf):
        tokens_read.clear()
        engine = Engine(target(kind), rows, 230, Strategy("streaming", 3, 12, 3), GREEDY)
        results = [*Refill(engine, requests, max_gap=1e9, share=share).results()]
        shared = sum(r.n_shared for r in results)
        totals.append(sum(tokens_read))
        check(results, requests, engine.model)
        assert n_tokens - shared <= totals[-1] <= n_tokens - shared + 6 * engine.prefill_chunk
    once, apart = totals
    assert not shared and apart >= n_tokens
    if kind == "all" or rows == 6:
        assert once <= len(document) + 6 * (29 + engine.prefill_chunk)


@pytest.mark.parametrize("strategy, rows", [("none", 1), ("ngram", 1), ("ngram", 2)])
def test_a_prompt_may_follow_from_an_answer(strategy, rows):
    """Requests are asked for when there is a row for them: here each is the turn after the last.

    The last token of an answer is in no cache, and what follows it is longer than a chunk.
    """
    engine, answers, asked, turns = engine_of(rows, strategy), [], [], []

    def conversation() -> Iterator[Request]:
        prompt = prompts()[2]
        for end in prompts_of([31, 30, 1], VOCAB, seed=8):
            asked.append(Request(prompt, 7))
            yield asked[-1]
            while not answers:  # in the other row
                asked.append(Request([5, 3, 8], 2))
                yield asked[-1]
            prompt = [*prompt, *answers.pop(), *end]

    results = []
    for r in Refill(engine, conversation(), share=SHARED).results():
        results.append(r)
        if len(r.request.prompt) > 3:
            turns.append(r)
            answers.append(r.token_ids)
    check(results, asked, engine.model)
    before = [len(r.request.prompt) + len(r.token_ids) for r in turns]
    assert [r.n_shared for r in turns] == [0, before[0] - 1, before[1] - 1]


def test_a_row_that_was_stopped_runs_no_more():
    engine = engine_of(2, "ngram", samplings=(GREEDY,))
    text = plain_greedy(target(), prompts()[0], 4)
    request = Request(prompts()[0], 40, stop=stop_at(text[3]))
    refill = Refill(engine, [request])
    (result,) = refill.results()
    check([result], [request], engine.model)
    assert result.finish_reason == "stop"
    assert 1 <= refill.summary()["rounds"] == result.stats.rounds <= 3


def test_nothing_is_kept_of_requests_that_are_done():
    """As many tensors after 300 requests as after the first ones."""
    engine, rng, alive = engine_of(4, "ngram"), random.Random(9), []

    def requests() -> Iterator[Request]:
        for i in range(320):
            if i in (20, 319):
                gc.collect()
                alive.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
            yield random_request(rng, limit=3)

    n = sum(1 for _ in Refill(engine, requests()).results())
    assert n == 320 and abs(alive[1] - alive[0]) < 20, alive


class Clock:
    """Forwards of one row, which read prompts, take a second each; all others a quarter."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.read = 0.0, 0
        hidden = Transformer.hidden

        def slow(model, tokens: Tensor, *args):
            self.now += 1.0 if len(tokens) == 1 else 0.25
            self.read += len(tokens) == 1
            return hidden(model, tokens, *args)

        monkeypatch.setattr(Transformer, "hidden", slow)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


@pytest.mark.parametrize("max_gap", [0.0, 2.5, 1e9])
def test_running_rows_wait_no_longer_than_they_must(max_gap, monkeypatch):
    """What the summary says is what is seen from outside, round by round."""
    clock, engine, rng = Clock(monkeypatch), engine_of(4, "streaming"), random.Random(3)
    round_, decide_first, began = engine.round, engine.batch.decide_first, [0.0] * 4
    busy, gaps, ends, queue_empty = [], [], [0.0], []

    def first(b: int, token: Tensor) -> None:
        decide_first(b, token)
        began[b] = clock.now

    def noted(gamma: int) -> None:
        running = (~engine.batch.finished).nonzero()[:, 0].tolist()
        busy.append(len(running))
        gaps.extend(clock.now - max(began[b], ends[-1]) for b in running)
        round_(gamma)
        ends.append(clock.now)

    def requests() -> Iterator[Request]:
        for _ in range(40):
            yield Request(rng.choice(prompts()), rng.randint(1, LIMIT))
        queue_empty.append(len(busy))

    monkeypatch.setattr(engine, "round", noted)
    monkeypatch.setattr(engine.batch, "decide_first", first)
    refill = Refill(engine, requests(), max_gap=max_gap, share=math.inf)
    results, summary = [*refill.results()], refill.summary()
    assert summary["longest_gap_seconds"] == max(gaps) > 0
    assert max(gaps) == {0.0: 1.0, 2.5: 2.0}.get(max_gap, max(gaps)) and max(gaps) >= 1
    assert max_gap < 1e9 or max(gaps) > 2.5
    until = queue_empty[0]
    assert summary["busy_share"] == sum(busy[:until]) / (4 * until)
    assert summary["row_rounds"] == sum(busy) == sum(r.stats.row_rounds for r in results)
    assert summary["rounds"] == len(busy)
    decoded = sum(len(r.token_ids) - 1 for r in results)
    assert summary["decoded_tokens"] == decoded == sum(r.stats.decoded_tokens for r in results)
    assert summary["prefill_seconds"] == clock.read
    assert summary["decode_seconds"] == clock.now - clock.read
    for name in ("accepted", "drafted", "drafts"):
        whole = getattr(engine.batch.stats(), name)
        assert sum(getattr(r.stats, name) for r in results) == whole > 0
    assert (
        max(r.wait_seconds + r.first_token_seconds + r.decode_seconds for r in results) == clock.now
    )


def test_what_a_request_waited_for(monkeypatch):
    """One row: the second request waits for all of the first one."""
    Clock(monkeypatch)
    engine = engine_of(1, "none", samplings=(GREEDY,))  # its rounds are forwards of one row, too
    chunks = [3, 1]
    requests = [Request(prompts_of([n], VOCAB)[0], 5) for n in (3 * 29, 20)]
    results = [*Refill(engine, requests).results()]
    first, second = ((r.wait_seconds, r.first_token_seconds, r.decode_seconds) for r in results)
    assert first == (0.0, chunks[0], 4.0) and second == (chunks[0] + 4.0, chunks[1], 4.0)


def test_the_longest_requests_come_first_if_asked():
    requests = [
        Request(prompts_of([n], VOCAB)[0], m) for n, m in ((9, 5), (30, 2), (1, 14), (25, 9))
    ]
    for longest_first, order in ((False, [0, 1, 2, 3]), (True, [3, 1, 2, 0])):
        results = Refill(engine_of(1, "none"), requests, longest_first=longest_first).results()
        assert [r.index for r in results] == order


FAULTS = {
    "more than the 114": Request([1] * 101, LIMIT),
    "0 tokens of prompt": Request([], 3),
    "0 new ones": Request([1], 0),
    "token ids must be in 0..30": Request([1, 31], 3),
    "in an engine for": Request([1], 3, Sampling(1.0)),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_request_that_cannot_be_served_is_named(words, tokens_read):
    """Before anything is read; one that comes later when its turn comes. The engine can go on."""
    engine, good = engine_of(2, "ngram", samplings=(GREEDY,)), Request([1, 2, 3], 5)
    requests = [good, good, good, FAULTS[words]]
    with pytest.raises(ValueError, match=f"request 3: .*{words}"):
        next(Refill(engine, requests).results())
    assert not tokens_read
    results = []
    with pytest.raises(ValueError, match=f"request 3: .*{words}"):
        results.extend(Refill(engine, iter(requests)).results())
    results = [*Refill(engine, [good]).results()]
    check(results, [good], engine.model)
    with pytest.raises(ValueError, match="17 tokens end a text"):
        next(Refill(engine, [good], tuple(range(17))).results())


def test_no_requests_have_no_results():
    refill = Refill(engine_of(2, "ngram"), [])
    assert [*refill.results()] == [] and refill.summary()["busy_share"] == 1.0


def test_the_readmes_lines_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    section = Path("README.md").read_text().split("## From Python")[1]
    exec(section.split("```python\n")[1].split("```")[0], {})
    said = capsys.readouterr().out
    assert all(text in said for text in ("import os\n", "def main(", "class Stack:\n"))
    assert len(said) > 150
