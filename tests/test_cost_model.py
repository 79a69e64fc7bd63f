"""The cost model: properties, enumerated cases, the command line, real byte counts."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import drafters
from acceptance import Acceptance, omega
from config import (
    MODELS,
    PREFILL_CHUNK,
    ModelConfig,
    kv_bytes_per_token,
    matrix_params,
    total_params,
    work_bytes,
)
from cost_model import (
    LOW_LOSS,
    PLAIN,
    Prediction,
    Strategy,
    all_strategies,
    crossing_length,
    largest_batch,
    main,
    memory_bytes,
    parse_args,
    plan,
    round_cost,
)
from kv_cache import CacheSpec, KVCache
from model import Transformer
from roofline import HARDWARE, Workload, forward_time, kv_bytes_on_gpu, whole_is_faster
from sampling import Sampling
from spec_decode import Engine
from tests.test_roofline import A100, LLAMA, ROUND, SMALL

ROOT = Path(__file__).resolve().parents[1]
STREAMING = Strategy("streaming", 3, 512)


def test_bytes_agree_with_real_parameters_and_caches():
    import torch

    from tests.reference import tiny_model

    for heads, tied in [((4, 2), False), ((7, 1), True)]:
        model = tiny_model(*heads, tie_embeddings=tied)
        c = model.config
        assert total_params(c) == sum(p.numel() for p in model.parameters())
        matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
        assert matrix_params(c) == sum(p.numel() for p in [*matrices, model.output.weight])
        cache = KVCache.empty(CacheSpec.for_model(model, 3), 256)
        n_bytes = sum(buffer.nbytes for buffer in cache.k + cache.v)
        assert n_bytes == 3 * 256 * kv_bytes_per_token(c, torch.float32.itemsize)


def test_published_parameter_counts():
    """Total parameters as the model cards give them."""
    for name, billions in {
        "llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "llama-3.2-1b": 1.24,
        "tinyllama-1.1b": 1.10, "mistral-7b": 7.25, "qwen2.5-7b": 7.61, "qwen2.5-32b": 32.5,
    }.items():  # fmt: skip
        assert total_params(MODELS[name]) / 1e9 == pytest.approx(billions, rel=0.01)
    assert kv_bytes_per_token(MODELS["llama-2-7b"]) == 512 * 1024
    assert kv_bytes_per_token(LLAMA) == 128 * 1024


def test_speedup_grows_with_length_and_past_the_critical_length_with_batch():
    lengths = [Prediction(LLAMA, A100, Workload(32, S, 8), STREAMING, 0.8).speedup
               for S in (2000, 8000, 32000, 128000)]  # fmt: skip
    assert lengths == sorted(lengths)
    batches = [Prediction(LLAMA, A100, Workload(B, 64000, 8), STREAMING, 0.8).speedup
               for B in (1, 8, 32, 128)]  # fmt: skip
    assert batches == sorted(batches) and batches[-1] > 1.3 * batches[0]


def test_break_even_acceptance_breaks_even():
    w = Workload(32, 32000, 8)
    p = Prediction(LLAMA, A100, w, STREAMING, 0.8)
    assert Prediction(LLAMA, A100, w, STREAMING, p.break_even).speedup == pytest.approx(1)
    itself = replace(p, strategy=Strategy("full", 3, 0, LLAMA))
    assert itself.round_cost > 4 and itself.break_even is None  # no round has more than 4 tokens
    assert round_cost(3, 10.0, 2.0, 14.0) == 2.0  # seconds in, plain steps out


def test_the_papers_critical_lengths():
    """Figure 1 of arXiv 2408.11049: A100, batch 256; peaks, and a verification of 2 drafts."""
    peak = replace(A100, flop_efficiency=1, bandwidth_efficiency=1)
    for name, length, ours in [("llama-2-7b", 395, 404), ("llama-3.1-8b", 1958, 1951)]:
        S = crossing_length(MODELS[name], peak, Workload(256, 1), gamma=2)
        assert pytest.approx(length, rel=0.1) == S and round(S) == ours
    slow = replace(A100, peak_flops=1e9)
    assert crossing_length(LLAMA, slow, Workload(256, 1), gamma=4) == math.inf
    assert crossing_length(LLAMA, A100, Workload(1, 1), gamma=0) == 0


def test_the_length_from_which_speculation_wins():
    w = Workload(32, 1, 8)
    n = Prediction(LLAMA, A100, w, STREAMING, 0.8).wins_from()
    for length, wins in ((n, True), (n - 1, False)):
        p = Prediction(LLAMA, A100, replace(w, prefix_len=length), STREAMING, 0.8)
        assert (p.speedup > 1) == wins
    assert Prediction(LLAMA, A100, w, STREAMING, 0.0).wins_from() is None


def test_the_winning_length_against_trying_all():
    """Also where a draft wins at short contexts, loses past a budget or window, and wins again."""
    rng, seen, most = random.Random(0), Counter(), 150
    for _ in range(300):
        target, small = (
            replace(SMALL, max_seq_len=9999, dim=dim, n_layer=n_layer, full_every=full_every,
                    sliding_window=rng.choice([None, None, 20, 60]))
            for dim, n_layer, full_every in [(8, 4, rng.choice([None, 2])),
                                             (1, 3, rng.choice([None, 3]))]
        )  # fmt: skip
        policy = rng.choice(["streaming", "chunks", "snapkv", "full"])
        model = small if policy == "full" else rng.choice([None, small])
        draft = Strategy(policy, rng.choice([1, 3]), rng.choice([5, 40]), model, "", 8)
        hw = replace(ROUND, layer_seconds=0.01, peak_flops=10 ** rng.uniform(3, 6))
        w = Workload(rng.choice([1, 9]), 1)
        alpha = rng.uniform(0.3, 1)
        full = replace(w, prefix_len=rng.choice([5, 20, 40, 60]))
        if even := Prediction(target, hw, full, draft, alpha).break_even:
            alpha = rng.choice([alpha, even * 0.998])  # just loses where something gets full
        wins = [Prediction(target, hw, replace(w, prefix_len=n), draft, alpha).speedup > 1
                for n in range(1, most + 1)]  # fmt: skip
        tail = len(list(itertools.takewhile(bool, reversed(wins))))
        found = Prediction(target, hw, w, draft, alpha).wins_from(most)
        assert found == (most - tail + 1 if tail else None)
        seen["never" if found is None else "always" if found == 1 else "later"] += 1
        seen["and before, and not between"] += tail > 0 and any(wins[: most - tail])
    assert len(seen) == 4 and min(seen.values()) >= 3


def test_what_drafting_costs():
    w, tiny = Workload(32, 32000, 8), MODELS["tinyllama-1.1b"]
    full = forward_time(LLAMA, A100, w).total
    streaming = STREAMING.draft_seconds(LLAMA, A100, w)
    assert streaming == forward_time(LLAMA, A100, w, 1, 512).total < full
    assert STREAMING.draft_seconds(LLAMA, A100, Workload(32, 100, 8)) < streaming
    snapkv = Strategy("snapkv", 3, 512, select_every=8)
    extra = snapkv.draft_seconds(LLAMA, A100, w) - streaming
    assert extra == pytest.approx(snapkv.selection_seconds(LLAMA, A100, w) / 8 / 3) and extra > 0
    assert replace(snapkv, policy="mixed").draft_seconds(LLAMA, A100, w) == streaming + extra
    assert replace(snapkv, select_every=0).draft_seconds(LLAMA, A100, w) == streaming
    both = Strategy("snapkv", 3, 512), Strategy("chunks", 3, 512)
    often, chunks = (s.draft_seconds(LLAMA, A100, w) for s in both)
    assert often - streaming == pytest.approx(2 * extra)  # by default every fourth round
    assert streaming < chunks < often
    k_read = w.batch_size * w.prefix_len * kv_bytes_on_gpu(LLAMA, w) / 2 / A100.bandwidth
    assert k_read < snapkv.selection_seconds(LLAMA, A100, w) < 1.5 * k_read < full / 2
    assert Strategy("ngram", 3).draft_seconds(LLAMA, A100, w) == 0
    own = Strategy("streaming", 3, 512, tiny).draft_seconds(LLAMA, A100, w)
    assert (
        forward_time(tiny, A100, w, 1, 512).total < own < streaming
    )  # re-anchoring costs something
    own_full = Strategy("full", 3, 0, tiny).draft_seconds(LLAMA, A100, w)
    assert own_full == forward_time(tiny, A100, w).total > own


def test_draft_weights_of_fewer_bytes_are_read_faster_and_take_memory():
    """Half of the bytes in the blocks, none of the output layer's; the copy is counted."""
    w = Workload(24, 32768)
    blocks = matrix_params(LLAMA) - LLAMA.dim * LLAMA.vocab_size
    same, fp8, bf16 = (replace(STREAMING, weights=kind) for kind in ("same", "fp8", "bf16"))
    saved = same.draft_seconds(LLAMA, A100, w) - fp8.draft_seconds(LLAMA, A100, w)
    assert saved == pytest.approx(blocks / A100.bandwidth)
    assert bf16.draft_seconds(LLAMA, A100, w) == same.draft_seconds(LLAMA, A100, w)
    copies = [s.memory_bytes(LLAMA, w, 999) - same.memory_bytes(LLAMA, w, 999) for s in (fp8, bf16)]
    assert copies == [blocks, 2 * blocks]
    on_cpu = replace(w, itemsize=4)
    saved = same.draft_seconds(LLAMA, A100, on_cpu) - bf16.draft_seconds(LLAMA, A100, on_cpu)
    kept = 24 * kv_bytes_per_token(LLAMA)  # of 2 bytes a number, where it would be 4
    read = (STREAMING.budget + 1) * kept  # with the new token's
    assert saved == pytest.approx((2 * blocks + read) / A100.bandwidth)
    held = [s.memory_bytes(LLAMA, on_cpu, 999) for s in (same, bf16)]
    assert held[0] - held[1] == (STREAMING.budget + STREAMING.gamma + 1) * kept - 2 * blocks
    chunks = (replace(s, policy="chunks").memory_bytes(LLAMA, on_cpu, 999) for s in (same, bf16))
    assert [n - b for n, b in zip(chunks, held, strict=True)] == [999 / 16 * kept] * 2  # mean keys
    table = [Acceptance("streaming", False, 512, 32768, 0.8, "measured")]
    assert fp8.expected_acceptance(32768, table) == pytest.approx(0.8 - LOW_LOSS)


def test_a_plan_chooses_the_draft_weights():
    """Where they fit: on a GPU that the target fills, there is no room for a copy."""
    h200, w = HARDWARE["h200"], Workload(24, 32768)
    strategies = all_strategies({}, (512,), (4, 5), ("same", "fp8"))
    assert sum(s.weights == "fp8" for s in strategies) == 8  # four policies, two gammas
    best, *others = plan(LLAMA, h200, w, strategies)
    assert best.strategy.weights == "fp8" and str(best.strategy) == "self, streaming 512 fp8"
    assert best.speedup > 1.1 * max(p.speedup for p in others if p.strategy.weights == "same")
    small = replace(h200, memory=memory_bytes(LLAMA, w, STREAMING) + 5e9)
    assert plan(LLAMA, small, w, strategies)[0].strategy.weights == "same"


def test_the_command_knows_draft_weights(capsys):
    flags = ["--hardware", "h200", "--batch_size", "24", "--prefix_len", "32768"]
    assert main([*flags, "--draft_weights", "same", "fp8"]) == 0
    assert "self, streaming 512 fp8" in capsys.readouterr().out
    assert main([*flags, "--draft_weights", "fp9"]) == 2
    assert "fp9" in capsys.readouterr().err


def test_the_plan_ranks_and_never_loses():
    drafts = all_strategies({"tiny": MODELS["tinyllama-1.1b"]}, (256, 512), range(1, 6))
    assert len(drafts) == 1 + 5 * (1 + 1 + 2 + 2 * 6)
    for w in (Workload(1, 256), Workload(32, 4000, 8), Workload(64, 64000, 8)):
        ranked = plan(LLAMA, A100, w, drafts)
        times = [1 / p.speedup for p in ranked]
        assert times == sorted(times) and ranked[0].speedup >= 1
        assert PLAIN in [p.strategy for p in ranked]
    tight, second = memory_bytes(LLAMA, w, STREAMING), replace(STREAMING, model=LLAMA)
    for memory, ranked in ((tight, [STREAMING, PLAIN]), (tight - 1, [PLAIN])):
        fitting = plan(LLAMA, replace(A100, memory=memory), w, [second, STREAMING])
        assert [p.strategy for p in fitting] == ranked
    assert len(plan(LLAMA, A100, w, [replace(STREAMING, gamma=0)])) == 1
    own = [d for d in drafts if d.model is None]
    assert plan(LLAMA, A100, Workload(1, 256), own)[0].strategy == PLAIN
    assert plan(LLAMA, A100, Workload(64, 64000, 8), drafts)[0].speedup > 1.4


def test_where_drafts_are_cheap_and_kept_the_plan_has_long_ones():
    """The default gammas reach 12, and at a usual acceptance no such round is proposed."""
    gammas, w = parse_args([]).gamma, Workload(64, 64000, 8)
    for alpha, longest in ((0.98, True), (0.8, False)):
        table = [Acceptance("mixed", False, 512, 64000, alpha, "")]
        best = plan(LLAMA, A100, w, all_strategies({}, [512], gammas), table)[0].strategy
        assert (best.policy, best.gamma == max(gammas) == 12) == ("mixed", longest)


def test_acceptance_comes_from_the_nearest_measurement():
    table = [Acceptance("streaming", False, b, s, a, "") for b, s, a in
             [(128, 4000, 0.5), (512, 4000, 0.7), (512, 64000, 0.6)]]  # fmt: skip
    for budget, length, alpha in [
        (128, 9, 0.5), (511, 9, 0.5), (600, 5000, 0.7), (999, 60000, 0.6)
    ]:  # fmt: skip
        draft = Strategy("streaming", 3, budget)
        assert draft.expected_acceptance(length, table) == alpha
    assert Strategy("ngram", 3).expected_acceptance(9, table) is None
    assert Strategy("streaming", 3, 127).expected_acceptance(9, table) is None
    own = Strategy("streaming", 3, 512, LLAMA)
    assert own.expected_acceptance(9, table) is None


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_the_largest_batch_is_the_last_that_fits(gpus):
    """Against counting up, also where no row fits, one does, and where it fits to the byte."""
    w = Workload(1, 800, gpus)
    for model in (LLAMA, MODELS["qwen2.5-7b"]):
        for draft in (PLAIN, STREAMING, Strategy("full", 3, 0, MODELS["llama-3.2-1b"])):

            def fits(rows, memory, model=model, draft=draft):
                return memory_bytes(model, replace(w, batch_size=rows), draft) <= memory

            to_the_byte = memory_bytes(model, replace(w, batch_size=9), draft)
            for memory in (1e9, to_the_byte - 1, to_the_byte, to_the_byte + 1, 24e9, 26.5e9):
                found = largest_batch(model, replace(A100, memory=memory), w, draft)
                assert found == next(n for n in itertools.count() if not fits(n + 1, memory))
    assert largest_batch(MODELS["llama-3.1-70b"], A100, Workload(1, 32000)) == 0


def test_the_work_of_a_round_by_hand():
    """dim 4, q, k and v 8, ffn 3: 44 numbers of 2 bytes a token; 7 of a chunk, 3 * (1 + 2)."""
    activations = (7 + 9) * (4 * 4 + 2 * 8 + 4 * 3) * 2
    logits = 3 * 3 * 5 * 2
    noise = 41 * 3 * 3 * 5
    assert work_bytes(SMALL, 3, 2, 7, 2, 0) == activations + logits
    assert work_bytes(SMALL, 3, 2, 7, 2, 41) == activations + logits + noise
    w = Workload(128, 8000)
    rest = (total_params(LLAMA) + 128 * (8000 + 1) * 65536) * 2
    assert memory_bytes(LLAMA, w) == rest + work_bytes(LLAMA, 128, 0, PREFILL_CHUNK, 2, 8)
    more = memory_bytes(LLAMA, w, Strategy("ngram", 8)) - memory_bytes(LLAMA, w)
    assert more > 1.6e9  # a vocabulary of 128k, and eight drafts to verify


@pytest.mark.parametrize("strategy, tokens, weights", [
    (PLAIN, 0, 0), (Strategy("ngram", 3), 0, 0), (Strategy("streaming", 3, 50), 50 + 4, 0),
    (Strategy("snapkv", 3, 50), 50 + 4, 0), (Strategy("full", 3, 0, SMALL), 100, 1),
    (Strategy("streaming", 3, 50, SMALL), 2 * 50 + 4, 1),
    (Strategy("snapkv", 3, 50, SMALL), 100 + 50 + 4, 1),
])  # fmt: skip
def test_the_memory_of_a_draft_by_hand(strategy, tokens, weights):
    """16 bytes of K and V a token, of one head, that each of both GPUs holds; 9 rows of 100."""
    w, table = Workload(9, 50, num_gpus=2), SMALL.vocab_size * SMALL.dim
    held = 2 * (total_params(SMALL) + table) / 2  # both have the whole table
    n_bytes = strategy.memory_bytes(SMALL, w, 100)
    assert n_bytes == 9 * 16 * tokens + weights * held
    whole = replace(strategy, whole=True).memory_bytes(SMALL, w, 100)
    assert whole == 9 * 16 * tokens + weights * 2 * total_params(SMALL)
    capacity = 50 + strategy.gamma + 1
    assert memory_bytes(SMALL, w, strategy) == strategy.memory_bytes(SMALL, w, capacity) + (
        held + 9 * 16 * capacity
        + work_bytes(SMALL, 9, strategy.gamma, PREFILL_CHUNK, 2, 8)
    )  # fmt: skip


def test_a_draft_model_is_divided_where_reading_it_takes_longer_than_to_exchange():
    """Also what is loaded follows `whole_is_faster`."""
    h100, models = HARDWARE["h100"], {name: MODELS[name] for name in ("llama-3.2-1b", "llama-2-7b")}
    small, large = models.values()
    w = Workload(4, 8192, num_gpus=8)
    assert whole_is_faster(small, h100, w, 256) and not whole_is_faster(large, h100, w, 256)
    ways = [s for s in all_strategies(models, [256], [4], num_gpus=8) if s.policy == "streaming"]
    assert len(ways) == 5 and len(all_strategies(models, [256], [4])) == 14
    seconds = {(s.model_name, s.whole): s.draft_seconds(LLAMA, h100, w) for s in ways if s.model}
    for name, m in models.items():
        assert (seconds[name, True] < seconds[name, False]) == whole_is_faster(m, h100, w, 256)
    assert str(Strategy("full", 4, model=small, whole=True)) == "draft model, whole, full"


def live_bytes(work) -> int:
    """The most bytes that the tensors made by `work` hold at any time."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes, peak = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            known = sizes.keys() | {t.untyped_storage()._cdata for t in given}
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and (s := t.untyped_storage())._cdata not in known:
                    sizes[s._cdata] = s.nbytes()
                    weakref.finalize(s, sizes.pop, s._cdata)
            peak = max(peak, sum(sizes.values()))
            return out

    with Watch():
        work()
    return peak


@pytest.mark.parametrize("dtype, gamma", [("float32", 0), ("float32", 5), ("bfloat16", 2)])
@pytest.mark.parametrize("flags", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}])
def test_the_work_of_a_round_is_enough_and_not_twice_too_much(flags, dtype, gamma):
    """Against the tensors of a real round, where the vocabulary is all that counts."""
    import torch

    from tests.reference import tiny_model

    model = tiny_model(vocab_size=5003).to(getattr(torch, dtype))
    sampling = Sampling(**flags)
    strategy = drafters.Strategy("streaming", gamma, 16) if gamma else drafters.Strategy()
    with torch.inference_mode():
        engine = Engine(model, 5, 40, strategy, sampling)
        engine.prefill([[1, 2, 3]] * 5, [30] * 5)
        measured = live_bytes(lambda: engine.round(gamma))
    itemsize = model.norm.weight.itemsize
    estimate = work_bytes(model.config, 5, gamma, 0, itemsize, 0 if sampling.greedy else 41)
    assert measured <= estimate <= 2 * measured


def test_the_work_of_a_prefill_is_enough_and_not_twice_too_much():
    """In 16 bits, where attention's scores are not kept."""
    import torch

    config = ModelConfig(dim=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, ffn_dim=700,
                         vocab_size=97, max_seq_len=500)  # fmt: skip
    model = Transformer(config).to(torch.bfloat16).requires_grad_(False)
    with torch.inference_mode():
        engine = Engine(model, 1, 400, drafters.Strategy(), Sampling())
        measured = live_bytes(lambda: engine.prefill_row(0, 390))
    estimate = work_bytes(config, 0, 0, engine.prefill_chunk, 2, 0)
    assert measured <= estimate <= 2 * measured
    gpu = replace(CacheSpec.for_model(model, 1), device=torch.device("cuda"))
    assert gpu.prefill_chunk == PREFILL_CHUNK


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("cost_model.py: ")
    return err


def test_command_line(capsys):
    flags = ["--num_gpus", "8", "--batch_size", "32", "128", "--prefix_len", "8192", "32768"]
    assert main([*flags, "--hardware", "h100", "--draft_model", "llama-3.2-1b"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + 1 + 4 + 1 and "8 x H100 SXM" in out


def test_the_picture_has_the_speedups_of_the_table(tmp_path, capsys):
    """A line per length, over the batches that fit; read off the axis, they are those printed."""
    path = tmp_path / "a.svg"
    flags = ["--num_gpus", "8", "--batch_size", "128", "8", "32", "--prefix_len", "100000", "8192"]
    assert main([*flags, "--svg", str(path)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {path}"
    rows = [line.split() for line in table[2:-1] if "does not fit" not in line]
    printed = {(int(r[0]), int(r[1])): float(r[-2]) for r in rows}
    assert len(printed) == 5 and max(printed.values()) > 1.5
    svg = path.read_text(encoding="utf-8")
    levels = dict(re.findall(r'y="([\d.]+)" text-anchor="end" class="muted small">([\d.]+)<', svg))
    (y0, low), *_, (y1, high) = [(float(y) - 4, float(level)) for y, level in levels.items()]
    lines = re.findall(r'class="line s\d-2" d="M([^"]*)"', svg)
    for S, line in zip((8192, 100000), lines, strict=True):
        ours = [speedup for (length, B), speedup in sorted(printed.items()) if length == S]
        drawn = [float(place.split(",")[1]) for place in line.split("L")]
        read = [low + (y0 - y) / (y0 - y1) * (high - low) for y in drawn]
        assert read == pytest.approx(ours, abs=0.01)
    assert re.findall(r">(\S+) tokens<", svg) == ["8k", "100,000"]


def test_no_picture_of_what_does_not_fit(tmp_path, capsys):
    path = tmp_path / "a.svg"
    assert main(["--batch_size", "9999", "--prefix_len", "99999", "--svg", str(path)]) == 2
    assert "nothing of this fits" in one_line(capsys) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("path", ["/nowhere/a.svg", "", "/proc/a.svg"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_table(capsys, path):
    assert main(["--svg", path]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("cost_model.py: --svg: cannot write ")


@pytest.mark.parametrize("flags", [[], ["--checkpoint_path", "checkpoints/demo"]])
def test_it_needs_no_torch(flags):
    """Without site-packages, where torch would be."""

    def bare(*args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-E", "-S", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "No module named 'torch'" in bare("-c", "import torch").stderr
    done = bare("cost_model.py", *flags, "--batch_size", "1")
    assert done.returncode == 0, done.stderr
    assert "memory-bound from" in done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "gpt-5"], "model 'gpt-5' is unknown; known: llama-2-7b,"),
        (["--hardware", "tpu"], "hardware 'tpu' is unknown; known: a100,"),
        (["--draft_model", "gpt-5"], "'gpt-5' is unknown"),
        (["--batch_size", "0"], "--batch_size 0 must be in 1..1000000000"),
        (["--prefix_len", "-4"], "--prefix_len -4 must be in 1.."),
        (["--num_gpus", "0"], "--num_gpus 0"),
        (["--gamma", "4", "101"], "--gamma 101 must be in 1..100"),
        (["--prefix_len", "8", "1" + 400 * "0"], "must be in 1..1000000000"),
        (["--batch_size", "many"], "many"),
        (["--batch_size", "9999", "--prefix_len", "99999"], "nothing of this fits"),
        (["--checkpoint_path", "/nowhere"], "/nowhere/config.json does not exist"),
        (["--acceptance", "README.md"], "not the JSON of generate.py with a fixed --draft"),
        (["--measured", "/nowhere.csv"], "unrecognized arguments: --measured"),
    ],
)
def test_unusable_flags_get_one_line(capsys, flags, words):
    assert main(flags) == 2
    assert words in one_line(capsys)


def test_acceptance_of_a_measured_run_replaces_the_papers(tmp_path, capsys):
    run = {"plan": {"strategy": "ngram", "gamma": 4}, "outputs": [{"prompt_length": 7000}],
           "speculative": {"mean_acceptance_length": 3.0}}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    assert main(["--acceptance", str(path), "--batch_size", "8", "--prefix_len", "8192"]) == 0
    assert "ngram" in capsys.readouterr().out


def test_a_draft_that_wins_here_has_a_length_from_which_it_wins(tmp_path, capsys):
    """Though a draft model with all of the KV loses at the longest contexts."""
    run = {"plan": {"strategy": "full", "gamma": 4}, "outputs": [{"prompt_length": 7000}],
           "speculative": {"mean_acceptance_length": omega(4, 0.7)}, "draft_model": {}}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    flags = ["--model", "qwen2.5-7b", "--draft_model", "llama-3.2-1b", "--hardware", "h200"]
    flags += ["--batch_size", "4", "--prefix_len", "32000", "300000", "--gamma", "4"]
    assert main([*flags, "--acceptance", str(path)]) == 0
    _, _, wins, loses, _ = capsys.readouterr().out.splitlines()
    assert "llama-3.2-1b, full" in wins and wins.split()[-1] == "1"
    assert "none" in loses and loses.split()[-1] == "never"


def test_a_window_shorter_than_the_critical_length_never_makes_it_memory_bound():
    w, model = Workload(256, 1), MODELS["mistral-7b"]
    length = crossing_length(model, A100, w, gamma=2)
    for window, expected in ((None, length), (math.ceil(length), length), (100, math.inf)):
        assert crossing_length(replace(model, sliding_window=window), A100, w, 2) == expected
    assert length > 100


def test_a_sliding_window_bounds_what_drafting_reads():
    """And what caches hold: windowed layers keep their windows, and full caches a chunk more."""
    model, short, long = MODELS["mistral-7b"], Workload(8, 4096), Workload(8, 32768)
    windowed = replace(model, sliding_window=4096)
    for draft in (Strategy("streaming", 3, 8192), Strategy("full", 3, 0, windowed)):
        expected = forward_time(model, A100, short).total
        assert draft.draft_seconds(windowed, A100, long) == expected
        drafts = replace(draft, model=draft.model and model)
        saved = memory_bytes(model, long, drafts) - memory_bytes(windowed, long, draft)
        held = 32768 + 4 - 4096 - PREFILL_CHUNK  # tokens less, by the target, and by who drafts
        held += held if draft.model else 8192 - 4096
        assert saved == 8 * held * kv_bytes_per_token(model)
    half = replace(windowed, full_every=2)
    draft = Strategy("streaming", 3, 8192)
    sizes = [memory_bytes(m, long, draft) for m in (model, half, windowed)]
    assert sizes[0] - sizes[1] == sizes[1] - sizes[2] > 0


def test_the_critical_length_of_layers_with_different_windows():
    """There, and not a token earlier, reading takes longer than computing."""
    model = replace(SMALL, n_layer=4, n_head=1, sliding_window=20, full_every=2)
    lengths = []
    for speed, B in itertools.product((0.06, 0.2), (2, 3, 4, 5, 90)):
        hw, w = replace(ROUND, peak_flops=speed * ROUND.peak_flops), Workload(B, 1)
        length = crossing_length(model, hw, w, 1)
        lengths.append(length)

        def bound_by_memory(n: float, hw=hw, w=w) -> bool:
            t = forward_time(model, hw, w, 2, context=n)
            return t.weights + t.kv >= t.linear_compute + t.attention_compute

        assert bound_by_memory(length * 1.0001)
        assert length == 0 or not bound_by_memory(length * 0.9999)
    assert 0 in lengths and len({sum(n > end for end in (0, 20)) for n in lengths}) == 3
