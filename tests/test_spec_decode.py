"""Lossless, token by token, greedy and sampled; ends, limits, and static shapes."""

import functools
import random
import weakref

import pytest
import torch

from batch import MAX_GAMMA, Request
from config import work_bytes
from kernels import compile_blocks
from kv_cache import SparseKVCache
from measure import decode
from model import Transformer
from policies import Strategy
from refill import generate
from sampling import Sampling, row_seed, widest
from spec_decode import Engine
from tests.reference import (
    COMPILED_BUDGET,
    COMPILED_CHUNK,
    COMPILED_LEN,
    COMPILED_ROWS,
    plain,
    plain_greedy,
    tiny_model,
)

GREEDY = Sampling()


def streaming(gamma: int, budget: int = 20, n_sink: int = 3) -> Strategy:
    return Strategy("streaming", gamma, budget, n_sink)


def prompts_of(lengths: list[int], vocab_size: int = 97, seed: int = 2) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def run(model: Transformer, prompts, n, strategy, sampling=GREEDY, eos=(), seed=0, draft=None):
    max_len = max(map(len, prompts)) + n
    engine = Engine(model, len(prompts), max_len, strategy, sampling, seed, draft)
    return generate(engine, prompts, n, eos)


PROMPTS = prompts_of([33, 1, 70, 12])
SAMPLINGS = [Sampling(1.0), Sampling(0.8, top_k=3), GREEDY, Sampling(1.2, top_p=0.7)]
REQUESTS = [
    Request(prompt, 45, sampling, row_seed(7, b))
    for b, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
]


def run_requests(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """What becomes of one request for each row."""
    engine.begin()
    for b, request in enumerate(requests):
        for _ in engine.start(b, request):
            pass
    engine.run()
    return engine.batch.outputs()


@functools.cache
def greedy_of(heads: tuple[int, int], n: int) -> list[list[int]]:
    """The continuations of PROMPTS by a tiny model with these heads."""
    model = tiny_model(*heads)
    return [plain_greedy(model, p, n) for p in PROMPTS]


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5, 6])
def test_greedy_output_is_the_models_own(heads, gamma):
    """Against an uncached forward: ragged prompts, budgets from one slot to everything."""
    model, expected = tiny_model(*heads), greedy_of(heads, 23)
    if gamma == 1:
        assert run(model, PROMPTS, 23, Strategy())[0] == expected
    for budget, n_sink in [(1, 0), (9, 4), (20, 3), (128, 4)][(gamma + heads[0]) % 2 :: 2]:
        outputs, stats = run(model, PROMPTS, 23, streaming(gamma, budget, n_sink))
        assert outputs == expected
        assert stats.decoded_tokens == 4 * 22  # the prefill decided the first of 23


def texts_of(model: Transformer, requests: list[Request]) -> list[list[int]]:
    return [plain(model, r.prompt, r.max_new_tokens, r.sampling, r.seed) for r in requests]


@pytest.mark.parametrize("gamma", [0, 1, 2, 3, 5])
def test_sampled_output_is_the_models_own(gamma):
    """Each row samples in its way, whichever row it is, whoever drafts how much beside whom."""
    model, requests = tiny_model(), REQUESTS[gamma % 4 :] + REQUESTS[: gamma % 4]
    engine = Engine(model, 4, 115, streaming(gamma), widest(SAMPLINGS))
    assert run_requests(engine, requests) == texts_of(model, requests)
    stats = engine.batch.stats()
    assert not gamma or 0.1 < stats.draft_acceptance_rate < 0.9


def compiled_engine(model, strategy, sampling=GREEDY, draft=None) -> Engine:
    """Of the shapes that tests of compiled models share, see `tests/reference.py`."""
    engine = Engine(model, COMPILED_ROWS, COMPILED_LEN, strategy, sampling, draft_model=draft)
    engine.prefill_chunk = COMPILED_CHUNK
    return engine


@pytest.mark.parametrize("gamma", [0, 3])
def test_greedy_output_is_the_same_compiled(gamma):
    """Other numbers of heads: tests/test_model.py."""
    model = tiny_model()
    compile_blocks(model)
    engine = compiled_engine(model, streaming(gamma, COMPILED_BUDGET))
    assert generate(engine, PROMPTS, 23)[0] == greedy_of((4, 2), 23)


def test_some_drafts_are_rejected_and_some_accepted():
    """The equalities above would say little if every draft were accepted, or none."""
    _, stats = run(tiny_model(), PROMPTS, 60, streaming(4, 20))
    assert all(count > 0 for count in stats.accepted_histogram)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_budget_for_everything_accepts_everything(sampling):
    """When sampling, also a test that top-k and top-p shape draft and target alike."""
    _, stats = run(tiny_model(), PROMPTS, 41, streaming(4, budget=128, n_sink=4), sampling)
    assert stats.draft_acceptance_rate > 0.999
    assert stats.rounds == 8  # 40 tokens at 5 a round


def test_prompt_lengths_around_the_chunk():
    model = tiny_model()
    for length in (63, 64, 65, 128, 129):
        prompts = prompts_of([length, 5])
        expected = [plain_greedy(model, p, 6) for p in prompts]
        engine = Engine(model, 2, length + 6, streaming(2), GREEDY)
        engine.prefill_chunk = 64 if length >= 64 else length
        assert generate(engine, prompts, 6)[0] == expected


def test_gamma_0_never_touches_the_draft_cache(monkeypatch):
    def fail(*_):
        raise AssertionError("the sparse cache was used")

    monkeypatch.setattr(SparseKVCache, "access", fail)
    monkeypatch.setattr(SparseKVCache, "slots", fail)
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [9] * 4)
    stats = decode(engine, 0)
    assert engine.batch.outputs() == [plain_greedy(model, p, 9) for p in PROMPTS]
    assert stats.rounds == 8 and stats.mean_acceptance_length == 1.0


@pytest.mark.parametrize(
    "compiled, gammas",
    [(False, (0, 3, 3, 1)), (True, (0, 3, 3, 0))],
    ids=["eager", "compiled"],
)
def test_an_engine_can_be_rewound_and_used_again(compiled, gammas):
    """Also after rounds in which some rows were finished: compiled, these read no KV any more."""
    eager, model = tiny_model(), tiny_model()
    if compiled:
        compile_blocks(model)
    engine = compiled_engine(model, streaming(3, COMPILED_BUDGET))
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = [plain_greedy(eager, p, 20) for p in prompts]
        engine.prefill(prompts, [20] * 4)
        for gamma in gammas:
            engine.rewind()
            decode(engine, gamma)
            assert engine.batch.outputs() == expected


@pytest.mark.parametrize("strategy", [Strategy(), streaming(2)])
def test_an_engine_that_is_dropped_frees_its_caches_at_once(strategy):
    """No reference cycle: the next engine may need the memory before garbage is collected."""
    engine = Engine(tiny_model(), 2, 50, strategy, GREEDY)
    generate(engine, PROMPTS[:2], 3)
    cache = weakref.ref(engine.full)
    del engine
    assert cache() is None


def test_a_drafter_that_is_replaced_makes_room_for_the_next(monkeypatch):
    """What was checked is that one of them fits, not both."""
    engine = Engine(tiny_model(), 2, 50, streaming(2), GREEDY)
    engine.add(streaming(3))
    caches = [weakref.ref(drafter.sparse) for drafter in engine.drafters]
    make, alive = engine.make, []

    def note(*args):
        alive.extend(cache() for cache in caches)
        return make(*args)

    monkeypatch.setattr(engine, "make", note)
    engine.use(streaming(4))
    assert alive == [None, None]


def test_an_engine_without_a_text_says_what_is_missing():
    engine = Engine(tiny_model(), 1, 50, streaming(3), GREEDY)
    for work in (engine.rewind, lambda: engine.round(0), lambda: decode(engine)):
        with pytest.raises(ValueError, match="prefill the engine first"):
            work()
    engine.warm_up(refills=True)
    engine.prefill([[1, 2]], [9])
    with pytest.raises(ValueError, match="before its first prefill"):
        engine.warm_up()
    for gamma in (-1, 4):
        with pytest.raises(ValueError, match=f"gamma {gamma} must be in 0..3"):
            engine.round(gamma)
    for sizes in ((0, 50), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Engine(tiny_model(), *sizes, streaming(3), GREEDY)


def test_a_refused_draft_leaves_the_engine_as_it_was(monkeypatch):
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    drafter = engine.drafter
    with pytest.raises(ValueError, match="needs a draft model"):
        engine.use(Strategy("full", 3))
    work = work_bytes(model.config, 4, 3, engine.prefill_chunk, 4, 0)
    monkeypatch.setattr("device.free_memory", lambda device: work)
    with pytest.raises(ValueError, match="GiB free"):
        engine.use(streaming(3, budget=60))
    engine.use(streaming(3))  # no more than the one it replaces
    assert engine.drafter is not drafter
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_an_engine_works_whoever_calls_it():
    """In inference mode or out of it, also in turns."""
    model = tiny_model()
    outputs = []
    for inside in ((), ("prefill",), ("run", "use")):

        def scope(name, inside=inside):
            return torch.inference_mode(name in inside)

        engine = Engine(model, 4, 100, streaming(3), Sampling(1.0))
        with scope("prefill"):
            engine.prefill(PROMPTS, [20] * 4)
        with scope("run"):
            engine.run(3, 3)
        with scope("use"):
            engine.use(streaming(3, 60))
        decode(engine)
        engine.rewind()
        decode(engine)
        outputs.append(engine.batch.outputs())
    assert outputs[0] == outputs[1] == outputs[2]


def test_drafting_and_verifying_decide_nothing():
    """They may be repeated at will: this is how they are warmed up and timed."""
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    for _ in range(3):
        draft = engine.draft(3)
        engine.verify(draft)
        engine.verify(draft.flip(0))
    decode(engine, 3)
    assert engine.batch.outputs() == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_nothing_recompiles_while_lengths_grow():
    """Also where rows accept different numbers of drafts and pass from one KV block to the next."""
    model = tiny_model()
    compile_blocks(model)
    engine = compiled_engine(model, streaming(3, COMPILED_BUDGET))
    engine.prefill(prompts_of([490, 3, 230, 5]), [200] * 4)
    for gamma in (0, 3):  # warm-up: every shape twice
        engine.round(gamma)
        engine.round(gamma)
    blocks, ragged, accepted = engine.batch.seq_len // 256, False, engine.batch.accepted.sum(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for gamma in [3] * 20 + [0, 3] * 5:
            before = engine.batch.seq_len.clone()
            engine.round(gamma)
            ragged |= len((engine.batch.seq_len - before).unique()) > 1
        assert (engine.batch.seq_len // 256 - blocks).tolist() == [1, 0, 1, 0]
        accepted = (engine.batch.accepted.sum(0) - accepted).tolist()
        plain = 4 * 5  # rows of plain rounds, which accept no draft
        assert ragged and accepted[0] > plain and accepted[3] > 0
        engine.prefill(prompts_of([613, 3, 77, 5]), [50] * 4)
        engine.round(3)


def test_a_seed_and_the_turn_fix_the_sampled_output():
    """The same question twice is sampled twice."""
    model, warm = tiny_model(), Sampling(1.0)
    for seed in (1, 2):
        engine = Engine(model, 4, 100, streaming(3), warm, seed)
        for turn in (0, 1):
            outputs, _ = generate(engine, PROMPTS, 20)
            seeds = [row_seed(seed, b, turn) for b in range(4)]
            expected = [plain(model, p, 20, warm, s) for p, s in zip(PROMPTS, seeds, strict=True)]
            assert outputs == expected
        engine.rewind()
        decode(engine)
        assert engine.batch.outputs() == expected


def test_compiling_what_is_around_the_blocks_changes_nothing():
    """As on a GPU. Where rows sample, it is compiled on a CPU too: tests/test_refill.py."""
    model, outputs = tiny_model(), []
    for fused in (False, True):
        engine = Engine(model, 4, 100, streaming(2), GREEDY)
        if fused:
            engine.around = engine.around.compiled(on_gpu=True)
        outputs.append(generate(engine, PROMPTS, 20))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Strategy("streaming", gamma=-1), "speculate_k -1"),
        (lambda: Strategy("streaming", budget=4, n_sink=4), "n_sink [+] 1 = 5"),
        (lambda: Strategy("streaming", n_sink=-1), "n_sink"),
    ],
)
def test_impossible_settings_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("max_len", [224, 256])  # with a round's overshoot 256; a whole KV block
def test_the_buffers_hold_what_a_round_writes_behind_max_len(max_len):
    """Row 0 ends there and takes part in all later rounds, of as many drafts as there can be."""
    model = tiny_model()
    engine = Engine(model, 2, max_len, streaming(MAX_GAMMA, 64), GREEDY)
    assert max_len % engine.full.spec.kv_block == 0 or max_len + MAX_GAMMA == 256
    prompts, limits = prompts_of([max_len - 2, 5]), [2, 80]
    engine.prefill(prompts, limits)
    decode(engine)
    assert engine.batch.seq_len[0] == max_len
    expected = [plain_greedy(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert engine.batch.outputs() == expected
