"""`--exact`: bfloat16, bit for bit, whatever is verified beside a token; on the CPU, and as cut."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import exact
import kv_cache
from batch import Request
from checkpoint import DEMO_CHECKPOINT, load_model
from exact import by_position, mask_by_position, slots_for
from kv_cache import Access, CacheSpec, KVCache
from model import Transformer, attend
from policies import Strategy
from refill import Refill
from sampling import Sampling
from spec_decode import Engine
from tests.test_spec_decode import prompts_of

GAMMA, NEW, GREEDY = 5, 24, Sampling()
PROMPTS = prompts_of([90, 41, 130], vocab_size=4096)
STRATEGIES = [
    Strategy("streaming", GAMMA, 24), Strategy("snapkv", GAMMA, 24), Strategy("chunks", GAMMA, 24),
    Strategy("mixed", GAMMA, 24), Strategy("ngram", GAMMA),
]  # fmt: skip


@functools.cache
def demo() -> Transformer:
    return load_model(DEMO_CHECKPOINT, torch.device("cpu"), torch.bfloat16)


def decided(
    strategy: Strategy, n_exact: int, gammas: tuple[int, ...] = (GAMMA,), sampling=GREEDY
) -> tuple[list[list[int]], list[dict[int, Tensor]]]:
    """The new tokens of every row, and by row and place the logits that decided it."""
    model = demo()
    model.exact = n_exact
    engine = Engine(model, len(PROMPTS), 130 + NEW, strategy, sampling, seed=3)
    engine.prefill(PROMPTS, [NEW] * len(PROMPTS))
    logits: list[dict[int, Tensor]] = [{} for _ in PROMPTS]
    verify = engine.verify

    def note(draft: Tensor) -> Tensor:
        out = verify(draft)
        for row, start, found in zip(logits, engine.batch.seq_len.tolist(), out, strict=True):
            row |= {start + t: found[t] for t in range(len(found))}  # the latest look counts
        return out

    engine.verify = note
    for n in range(10 * NEW):
        if engine.batch.finished.all():
            break
        engine.round(gammas[n % len(gammas)])
    texts, ends = engine.batch.outputs(), engine.batch.seq_len.tolist()
    rows = zip(logits, ends, strict=True)
    return texts, [{p: x for p, x in row.items() if p < end} for row, end in rows]


def equal_bits(one: list[dict[int, Tensor]], other: list[dict[int, Tensor]]) -> bool:
    assert [row.keys() for row in one] == [row.keys() for row in other]
    return all(torch.equal(a[p], b[p]) for a, b in zip(one, other, strict=True) for p in a)


@functools.cache
def plain(n_exact: int, sampling: Sampling) -> tuple[list[list[int]], list[dict[int, Tensor]]]:
    return decided(Strategy(), n_exact, (0,), sampling)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.policy)
def test_speculation_decides_by_the_very_bits_of_plain_decoding(strategy):
    assert_same(*decided(strategy, GAMMA), *plain(GAMMA, GREEDY))


def assert_same(texts, logits, plain_texts, plain_logits) -> None:
    assert texts == plain_texts and equal_bits(logits, plain_logits)


def test_neither_gamma_nor_sampling_matters():
    sampling = Sampling(0.9, 50, 0.95)
    ours = decided(STRATEGIES[3], GAMMA, (5, 0, 2, 1), sampling)
    assert_same(*ours, *plain(GAMMA, sampling))


def test_without_padding_the_bits_are_others():
    """Else the equalities above would say nothing."""
    assert not equal_bits(decided(STRATEGIES[0], 0)[1], plain(0, GREEDY)[1])
    assert not equal_bits(plain(0, GREEDY)[1], plain(GAMMA, GREEDY)[1])


def test_refilled_rows_and_conversations_are_exact():
    """Who sits beside whom, what a row held before, and what of a conversation is in the cache."""
    model, answers = demo(), []
    model.exact = GAMMA
    for strategy in (Strategy(), STRATEGIES[0]):
        engine = Engine(model, 2, 300, strategy, GREEDY)
        requests = [Request(p + q, 12) for p in PROMPTS[:2] for q in ([], [7, 9])]
        texts = sorted((r.index, r.token_ids) for r in Refill(engine, requests, share=20).results())
        prompts = PROMPTS[:2]
        for _ in range(2):  # turns
            engine.prefill(prompts, [20, 20], reuse=True)
            engine.run()
            texts.append(engine.batch.outputs())
            prompts = [p + out + [3] for p, out in zip(prompts, texts[-1], strict=True)]
        answers.append(texts)
    assert answers[0] == answers[1]


def test_nothing_is_copied_from_other_rows():
    model = demo()
    for n_exact in (0, GAMMA):
        model.exact = n_exact
        engine = Engine(model, 1, 200, Strategy(), GREEDY)
        results = Refill(engine, [Request(PROMPTS[0], 3)] * 2, share=20).results()
        assert [r.n_shared for r in results] == [0, 0 if n_exact else len(PROMPTS[0]) - 1]


def test_a_drafter_of_another_gamma_is_refused():
    model = demo()
    model.exact = GAMMA
    with pytest.raises(ValueError, match="gamma 3: this engine verifies 5 drafts always"):
        Engine(model, 1, 200, Strategy("streaming", 3, 24), GREEDY)
    model.exact = 0


SPLIT = {"SPLIT_KV": 6, "num_warps": 2}
SPEC = CacheSpec((None,), 3, 2, 16, 2, torch.float32, torch.device("cpu"), True, exact=5)


@pytest.mark.parametrize("change, T, size, window, n", [
    ({}, 6, 12 * 256, None, 6), ({}, 6, 9 * 256, None, 3), ({}, 6, 7 * 256, None, 1),
    ({}, 5, 12 * 256, None, 0), ({}, 6, 12 * 256, 700, 1), ({"exact": 0}, 1, 12 * 256, None, 0),
])  # fmt: skip
def test_a_cache_is_cut_into_equal_pieces(change, T, size, window, n):
    options, pieces = by_position(SPLIT, replace(SPEC, **change), T, size, window)
    assert pieces == max(n, 1)
    assert options == (SPLIT | {"SPLIT_KV": 1} if n else SPLIT)
    assert by_position(None, SPEC, 6, size, window) == (None, 1)


def test_slots_are_added_for_equal_pieces(monkeypatch):
    monkeypatch.setattr(exact, "kernel_options", lambda spec, B, T: SPLIT)
    assert slots_for(SPEC, 7 * 256 - 3) == 12 * 256
    assert slots_for(SPEC, 3 * 256) == 3 * 256  # fewer blocks than pieces
    assert slots_for(replace(SPEC, exact=0), 7 * 256 - 3) == 7 * 256


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_to_pieces_is_attention(monkeypatch):
    """With rows that see one piece, two, all six."""
    torch.manual_seed(0)
    monkeypatch.setattr(exact, "kernel_options", lambda spec, B, T: SPLIT)
    monkeypatch.setattr(kv_cache, "kernel_options", lambda spec, B, T, contiguous: SPLIT)
    monkeypatch.setattr(CacheSpec, "kv_block", 128)
    cache = KVCache.empty(SPEC, 700)
    assert cache.capacity == 6 * 128
    for buffer in cache.k + cache.v:
        buffer.normal_()
    pos = torch.tensor([690, 3, 255])[:, None] + torch.arange(6)
    q = torch.randn(3, 6, 4, 16)
    (access,) = cache.access(pos)
    assert access.n_pieces == 6 and access.kernel_options["SPLIT_KV"] == 1
    access = access._replace(kernel_options=None)  # eager: there is no kernel
    for cap in (None, 3.0):
        ours = attend(q, cache.k[0], cache.v[0], access, 0.25, cap)
        dense = Access(cache.dense_mask(pos, *cache.layers[0]))
        expected = attend(q, cache.k[0], cache.v[0], dense, 0.25, cap)
        assert (ours - expected).abs().max() < 1e-6


def test_a_pieces_blocks_are_those_of_its_slots():
    """The second row passes from one block to the next, the third is finished."""
    pos = torch.tensor([[700], [255], [90]]) + torch.arange(6)
    mask = mask_by_position(pos, 1536, 3, SPEC, torch.tensor([False, False, True]))
    assert mask.kv_num_blocks[:, :, 0].tolist() == [[2, 1, 0] * 2, [2, 0, 0] * 2, [0] * 6]
    assert mask.shape == (3, 6, 12, 512)
