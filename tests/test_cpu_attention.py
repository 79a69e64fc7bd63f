"""The CPU's own operator: exact, the same for a token alone and among others, and optional."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cpu_attention
from cpu_attention import ALL, PART, TILE, attend, build, runs
from kernels import compile_blocks
from kv_cache import CacheSpec, KVCache
from policies import Strategy
from refill import generate
from tests.reference import COMPILED_CHUNK, tiny_model
from tests.test_spec_decode import PROMPTS, compiled_engine

pytestmark = pytest.mark.skipif(
    not runs("cpu", 16, torch.float32), reason="no compiler that builds it"
)


def dense(q: Tensor, k: Tensor, v: Tensor, start: Tensor, window: int, cap: float):
    """The same in float64, from the definition of what a slot holds."""
    S, T = k.shape[2], q.shape[3]
    newest = (start + T - 1)[:, None]
    position = newest - (newest - torch.arange(S)) % S  # [B, S]
    at = start[:, None] + torch.arange(T)  # [B, R]
    seen = (position[:, None] <= at[..., None]) & (position[:, None] > at[..., None] - window)
    seen &= position[:, None] >= 0
    scores = q.double() @ k.double().transpose(-1, -2)[:, :, None]
    scores = cap * torch.tanh(scores / cap) if cap else scores
    probs = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    return probs.nan_to_num(0) @ v.double()[:, :, None]


def inputs(B: int, Hkv: int, G: int, T: int, D: int, S: int, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(B * S + G * T)
    k, v = (torch.randn(B, Hkv, S, D).to(dtype) for _ in range(2))
    return [torch.randn(B, Hkv, G, T, D), k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "D, Hkv, G, T, S, window, cap, turned",
    [
        (16, 2, 1, 1, 256, ALL, 0.0, False),
        (16, 1, 7, 3, 512, 100, 0.0, False),
        (16, 2, 2, 6, 2 * PART + 256, ALL, 20.0, False),
        (48, 3, 4, 13, PART, 300, 0.0, True),
        (16, 1, 1, 6, 512, 400, 5.0, True),
        (16, 1, 3, 1, 39, ALL, 0.0, False),  # slots that do not fill a tile
    ],
)
def test_it_is_attention(D, Hkv, G, T, S, window, cap, turned, dtype):
    """Ragged rows: finished, empty but for the new tokens, of any length, full."""
    starts = [-T, 0, 1, TILE - 1, S // 3, S - T - 1]
    start = torch.tensor(starts[:1] + [n + S * turned for n in starts[1:]])
    q, k, v = inputs(len(starts), Hkv, G, T, D, S, dtype)
    ours = attend(q, k, v, start, window, cap)
    assert (ours - dense(q, k, v, start, window, cap)).abs().max() < 1e-5
    assert not ours[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [1, 4])
def test_a_token_is_the_same_alone_and_among_others(G, dtype):
    """Bit for bit; so verifying a token and decoding it differ in linear layers only."""
    T, S, D = 6, 2 * PART, 16
    q, k, v = inputs(3, 2, G, T, D, S, dtype)
    start = torch.tensor([5, PART - 3, 2 * PART - 7])
    together = attend(q, k, v, start, ALL, 0.0)
    for t in range(T):
        one = q[:, :, :, t : t + 1]
        assert torch.equal(attend(one, k, v, start + t, ALL, 0.0), together[:, :, :, t : t + 1])


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_width_do_the_same(lanes, tmp_path, monkeypatch):
    """Those of other machines, too: here a compiler makes several instructions of a wide one."""
    source = Path(cpu_attention.__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    choice = re.search(r"#if defined.*?#endif\n", source, flags=re.S)[0]
    (tmp_path / "lanes.cpp").write_text(source.replace(choice, f"constexpr int W = {lanes};\n"))
    monkeypatch.setattr(cpu_attention, "__file__", str(tmp_path / "lanes.py"))
    monkeypatch.setattr(cpu_attention, "build", build.__wrapped__)
    test_it_is_attention(48, 1, 3, 3, 512, 100, 0.0, True, torch.float32)
    test_a_token_is_the_same_alone_and_among_others(1, torch.float32)


def test_threads_change_nothing():
    q, k, v = inputs(1, 1, 1, 2, 16, 3 * PART)
    start, answers = torch.tensor([3 * PART - 5]), []
    for n in (1, 3):
        torch.set_num_threads(n)
        answers.append(attend(q, k, v, start, ALL, 0.0))
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("G, T, S", [(1, 1, 39), (2, 2, 32), (4, 1, 134)])
def test_a_mask_says_what_is_seen(G, T, S, heads, dtype):
    """Of a draft's cache, whose slots do not fill a tile. Who sees nothing gets zeros."""
    q, k, v = inputs(2, 3, G, T, 16, S, dtype)
    mask = torch.rand(2, heads, G * T, S) < 0.5
    mask[1, 0, -1] = False
    scores = (q.double() @ k.double().transpose(-1, -2)[:, :, None]).flatten(2, 3)
    probs = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num(0)
    ours = attend(q, k, v, torch.tensor([7, 7]), ALL, 0.0, mask).flatten(2, 3)
    assert (ours - probs @ v.double()).abs().max() < 1e-5
    assert not ours[1, 0, -1].any()


def test_what_is_not_seen_may_be_anything():
    q, k, v = inputs(1, 1, 1, 2, 16, 256)
    start, ours = torch.tensor([40]), []
    for rubbish in (1.0, 1e30):
        k[:, :, 42:] = v[:, :, 42:] = rubbish
        ours.append(attend(q, k, v, start, ALL, 0.0))
    assert torch.equal(*ours)


def test_compiled_decoding_uses_it_and_stays_lossless(monkeypatch):
    """A cache of bfloat16 beside float32 is another target: both ways of decoding it agree."""
    monkeypatch.setattr(CacheSpec, "prefill_chunk", COMPILED_CHUNK)
    calls = []
    monkeypatch.setattr(cpu_attention, "build", lambda *kind: calls.append(kind) or build(*kind))
    model = tiny_model()
    model.kv_dtype = torch.bfloat16
    compile_blocks(model)
    texts = []
    for strategy in (Strategy(), Strategy("streaming", 3, 12, n_sink=3)):
        engine = compiled_engine(model, strategy)
        assert engine.full.k[0].dtype == torch.bfloat16
        texts.append(generate(engine, PROMPTS, 45)[0])
    assert texts[0] == texts[1] and set(calls) == {(16, torch.bfloat16)}


def test_verifications_of_any_length_are_compiled_once():
    """Of two drafts or more, and with them what a forward writes into the draft's cache."""
    model = tiny_model()
    compile_blocks(model)
    engine = compiled_engine(model, Strategy("snapkv", 7, 12, n_sink=3))
    made = torch._dynamo.utils.counters["stats"]
    with engine.pretend(9):
        engine.refresh()
        engine.decide(engine.draft(3))
        before = made["unique_graphs"]
        for gamma in (1, 2, 5, 7):
            engine.decide(engine.draft(gamma))
    assert made["unique_graphs"] == before > 0


@pytest.mark.parametrize("kind", [("cuda", 16, torch.float32), ("cpu", 24, torch.float32),
                                  ("cpu", 16, torch.float16)])  # fmt: skip
def test_it_says_where_it_does_not_run(kind):
    assert not runs(*kind)


def test_without_a_compiler_flex_attention_does_the_work(monkeypatch):
    def broken(*kind):
        raise subprocess.CalledProcessError(1, "g++")

    monkeypatch.setattr(cpu_attention, "build", broken)
    runs.cache_clear()
    model = tiny_model()
    model.compiled = True
    spec = CacheSpec.for_model(model, 1)
    runs.cache_clear()
    assert not spec.operator and spec.flex
    mask = KVCache.empty(spec, 300).access(torch.tensor([[7]]))[0].mask
    assert type(mask).__name__ == "BlockMask"
