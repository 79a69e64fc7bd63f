"""The forward against a float64 loop, eager and compiled."""

from dataclasses import replace

import pytest
import torch

from config import RopeScaling
from kernels import compile_blocks
from kv_cache import Access, CacheSpec, KVCache
from model import Transformer, attend
from tests.reference import (
    COMPILED_CHUNK,
    COMPILED_LEN,
    COMPILED_ROWS,
    reference_logits,
    tiny_model,
)

RATIOS = [(3, 3), (4, 2), (4, 1), (7, 1)]  # H, Hkv: G = 1, 2, 4, 7
LLAMA3 = RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


def cached_logits(model: Transformer, rows: list[list[int]], chunks: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of equally long rows, fed through a cache in pieces of the given sizes."""
    cache = KVCache.empty(CacheSpec.for_model(model, len(rows)), len(rows[0]))
    tokens, pieces, start = torch.tensor(rows), [], 0
    for n in chunks:
        pos = torch.arange(start, start + n).expand(len(rows), n)
        pieces.append(model(tokens[:, start : start + n], pos, cache))
        start += n
    assert start == len(rows[0])
    return torch.cat(pieces, dim=1)


def random_rows(n_rows: int, length: int, vocab_size: int = 97, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n_rows, length), generator=generator).tolist()


@pytest.mark.parametrize("heads", RATIOS)
@pytest.mark.parametrize("chunks", [[37], [1] * 37, [5, 31, 1], [36, 1]])
def test_cached_forward_equals_float64_reference(heads, chunks):
    model = tiny_model(*heads)
    rows = random_rows(2, 37)
    expected = torch.stack([reference_logits(model, row) for row in rows])
    got = cached_logits(model, rows, chunks).double()
    assert (got - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, {"rope_scaling": LLAMA3}])
def test_variants_equal_float64_reference(changes):
    model = tiny_model(**changes)
    rows = random_rows(1, 90)
    expected = reference_logits(model, rows[0])
    got = cached_logits(model, rows, [60, 30])[0].double()
    assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_llama3_scaling_changes_something():
    rows = random_rows(1, 90)
    plain, scaled = (tiny_model(rope_scaling=s) for s in (None, LLAMA3))
    difference = cached_logits(plain, rows, [90]) - cached_logits(scaled, rows, [90])
    assert difference.abs().max() > 0.1


def test_compiled_flex_equals_reference():
    """One chunk that is a multiple of the query block, row by row, then four tokens and one.

    Other numbers of heads: the next test.
    """
    model = tiny_model()
    compile_blocks(model)
    n, rows = COMPILED_CHUNK, random_rows(COMPILED_ROWS, COMPILED_CHUNK + 5)
    tokens, pos = torch.tensor(rows), torch.arange(n + 5).expand(COMPILED_ROWS, -1)
    cache = KVCache.empty(CacheSpec.for_model(model, COMPILED_ROWS), COMPILED_LEN)
    pieces = [
        torch.cat([model(tokens[b : b + 1, :n], pos[:1, :n], cache.row(b)) for b in range(4)]),
        model(tokens[:, n : n + 4], pos[:, n : n + 4], cache),
        model(tokens[:, n + 4 :], pos[:, n + 4 :], cache),
    ]
    for row, got in zip(rows[:2], torch.cat(pieces, dim=1), strict=False):
        expected = reference_logits(model, row)
        assert (got.double() - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    "dtype, longest", [(torch.float32, 640), (torch.float32, 128), (torch.bfloat16, 128)]
)
def test_windows_and_all_traits_are_the_same_compiled(dtype, longest):
    """Eager, they are held against transformers (tests/test_families.py).

    Layer 0 has a window, and with forwards of at most 128 tokens a ring. Both read one cache.
    Seven heads of 33 tokens fold into one and a half query blocks.
    """
    traits = {"sliding_window": 50, "full_every": 2, "attention_cap": 2.0, "logit_cap": 3.0,
              "post_norms": True, "norm_plus_one": True, "activation": "gelu_tanh",
              "scaled_embedding": True, "qk_norm": True, "local_rope_theta": 100.0,
              "query_pre_attn_scalar": 3.0}  # fmt: skip
    eager, compiled = (tiny_model(7, 1, **traits).to(dtype) for _ in range(2))
    compile_blocks(compiled)
    tokens, pos = torch.tensor(random_rows(4, 673)), torch.arange(673).expand(4, 673)
    cache = KVCache.empty(CacheSpec.for_model(eager, 4), COMPILED_LEN, longest=longest)
    assert bool(cache.rings) == (longest == 128)
    for at in range(0, 640, longest):
        eager(tokens[:, at : at + longest], pos[:, at : at + longest], cache)
    expected = eager(tokens[:, 640:], pos[:, 640:], cache).float()
    flex = replace(cache, spec=replace(cache.spec, flex=True))
    got = compiled(tokens[:, 640:], pos[:, 640:], flex).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (got - expected).abs().max() < tolerance * expected.std()


@pytest.mark.parametrize("window", [1, 5, 29, 30, None])
def test_without_a_cache_a_sliding_window_is_the_same(window):
    model, rows = tiny_model(sliding_window=window), random_rows(2, 30)
    got = model(torch.tensor(rows), torch.arange(30).expand(2, 30)).double()

    def visible(q: int, p: int) -> bool:
        return q - (window or 30) < p <= q

    expected = torch.stack([reference_logits(model, row, visible) for row in rows])
    assert (got - expected).abs().max() < 1e-4 * expected.std()
    assert (got - cached_logits(model, rows, [30])).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_with_a_mask_in_every_dtype(dtype):
    """Against a loop in float64. What is masked is large, so that a leak cannot be missed."""
    B, T, H, Hkv, S, D = 2, 3, 6, 2, 11, 8
    generator = torch.Generator().manual_seed(6)
    q, k, v = (
        torch.randn(B, *shape, D, generator=generator).to(dtype)
        for shape in ((T, H), (Hkv, S), (Hkv, S))
    )
    mask = torch.rand(B, Hkv, H // Hkv * T, S, generator=generator) < 0.4
    mask[..., 0] = True  # every query sees something
    hidden = ~mask.any(dim=2)[..., None]  # of slots that no query sees
    assert hidden.any()
    k, v = k + 5 * hidden, v + 100 * hidden
    got = attend(q, k.to(dtype), v.to(dtype), Access(mask), D**-0.5).view(B, T, H, D)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = mask[b, h // 3, h % 3 * T + t]
                scores = k[b, h // 3, seen].double() @ q[b, t, h].double() / D**0.5
                expected = scores.softmax(0) @ v[b, h // 3, seen].double()
                tolerance = 1e-5 if dtype == torch.float32 else 0.05
                assert (got[b, t, h] - expected).abs().max() < tolerance


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_rows_at_different_lengths_equal_the_rows_alone(compiled, n_tokens):
    """A batch step where every row stands somewhere else; also with garbage in unseen slots."""
    model = tiny_model()
    lengths = [3, 100, 61, 1]
    rows = random_rows(COMPILED_ROWS, 104)
    cache = KVCache.empty(CacheSpec.for_model(model, COMPILED_ROWS), COMPILED_LEN)
    for b, n in enumerate(lengths):
        model(torch.tensor([rows[b][:n]]), torch.arange(n)[None], cache.row(b))
    if compiled:
        compile_blocks(model)
        cache = replace(cache, spec=CacheSpec.for_model(model, COMPILED_ROWS))
    pos = torch.tensor(lengths)[:, None] + torch.arange(n_tokens)
    tokens = torch.tensor([rows[b][n : n + n_tokens] for b, n in enumerate(lengths)])
    together = model(tokens, pos, cache)
    for b, n in enumerate(lengths):
        alone = reference_logits(model, rows[b][: n + n_tokens])[-n_tokens:]
        assert (together[b].double() - alone).abs().max() < 1e-4 * alone.std()
    for b, n in enumerate(lengths):
        for k, v in zip(cache.k, cache.v, strict=True):
            k[b, :, n + n_tokens :] = 1e6
            v[b, :, n + n_tokens :] = -1e30
    assert torch.equal(model(tokens, pos, cache), together)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 40**0.5), (torch.bfloat16, 6.3125)])
def test_the_scale_of_embeddings_is_rounded_as_the_weights_are(dtype, scale):
    """Then the product is: sqrt(40) = 6.3246 is 6.3125 in bfloat16."""
    model, tokens = tiny_model(scaled_embedding=True).to(dtype), torch.arange(97)[None]
    assert torch.equal(model.embed(tokens), model.tok_embeddings(tokens) * scale)


def test_what_a_ring_has_lost_is_read_again(monkeypatch):
    """Wherever a text of 200 tokens is taken up again; the last forward goes back four tokens."""
    monkeypatch.setattr("model.SHORT", 5)
    monkeypatch.setattr(CacheSpec, "kv_block", 8)
    monkeypatch.setattr(CacheSpec, "prefill_chunk", 29)
    model, tokens = tiny_model(sliding_window=13), torch.tensor(random_rows(1, 200))
    spec, n_read = CacheSpec.for_model(model, 1), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: n_read.append(1) or hidden(*args))
    for n in range(150, 175):
        cache, fresh = KVCache.empty(spec, 200), KVCache.empty(spec, 200)
        model.prefill(tokens, 200, 29, cache)
        n_read.clear()
        got = model.prefill(tokens, n + 1, 29, cache, n)
        assert (len(n_read) == 1) == (n > 167)  # 199 is written over 151, and 167 - 4 sees it
        expected = model.prefill(tokens, n + 1, 29, fresh)
        assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_windowed_layers_have_a_rotation_of_their_own():
    """With their own base they are not stretched, and YaRN's factor is not theirs either."""
    yarn = RopeScaling("yarn", 4.0, 64, attention_factor=1.5)
    windows, pos = {"sliding_window": 5, "full_every": 2}, torch.arange(90)[None]
    alone = tiny_model(rope_theta=100.0).ropes(pos)[0]
    stretched = tiny_model(rope_scaling=yarn).ropes(pos)[0]
    for local, expected in ((100.0, alone), (None, stretched)):
        ropes = tiny_model(rope_scaling=yarn, local_rope_theta=local, **windows).ropes(pos)
        for got, both in zip(ropes, (expected, stretched), strict=True):
            assert all(torch.equal(*pair) for pair in zip(got, both, strict=True))
    assert tiny_model(local_rope_theta=100.0).ropes(pos)[0][0].equal(tiny_model().ropes(pos)[0][0])


def test_norms_that_add_one_do_so_in_float32():
    """1 + w in bfloat16 would round w to a multiple of 1/128."""
    model = tiny_model(norm_plus_one=True).to(torch.bfloat16)
    x, norm = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)), model.norm
    y = x.bfloat16().double()
    y = y / (y.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    assert (norm(x.bfloat16()).double() - y).abs().max() <= (y.abs() / 256).max()
    assert torch.equal(norm(x.bfloat16()), y.bfloat16())
