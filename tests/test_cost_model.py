"""The cost model: properties, hand-computed cases, the paper's measurements, real byte counts."""

import itertools
import json
import math
import random
import re
import shlex
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

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
    PLAIN,
    Acceptance,
    Draft,
    alpha_of,
    break_even,
    candidates,
    compare,
    crossing_length,
    draft_step,
    expected_acceptance,
    largest_batch,
    main,
    memory_bytes,
    omega,
    plan,
    predict,
    read_acceptance,
    read_measured,
    selection,
    winning_length,
)
from drafters import Strategy
from kv_cache import CacheSpec, KVCache
from model import Transformer
from roofline import HARDWARE, Hardware, Timing, Workload, fit, forward_time
from spec_decode import Engine, Sampling

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE3 = ROOT / "benchmarks" / "data" / "magicdec_table3_8xA100.csv"
TABLE6 = TABLE3.with_name("magicdec_table6_8xH100.csv")
LLAMA, A100 = MODELS["llama-3.1-8b"], HARDWARE["a100"]
STREAMING = Draft("streaming", 3, 512)
MEDIAN = re.compile(r"^(.*\S) +median error ([\d.]+)%", re.MULTILINE)  # in what compare returns
# A device and a model whose numbers can be worked out by hand.
ROUND = Hardware("round", 1000.0, 100.0, 1e6, flop_efficiency=0.5, bandwidth_efficiency=0.1,
                 layer_seconds=0.25, all_reduce_seconds=0.5, link_bandwidth=8.0)  # fmt: skip
SMALL = ModelConfig(dim=4, n_layer=2, n_head=2, n_kv_head=1, head_dim=2, ffn_dim=3, vocab_size=5,
               max_seq_len=100)  # fmt: skip


def test_omega_and_its_limits():
    for gamma in range(6):
        assert omega(gamma, 0.0) == 1
        assert omega(gamma, 1.0) == gamma + 1
        for alpha in (0.3, 0.9):
            assert omega(gamma, alpha) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
            if gamma:
                assert alpha_of(omega(gamma, alpha), gamma) == pytest.approx(alpha)
    assert omega(0, 0.7) == 1
    with pytest.raises(ValueError, match="not in 1..4"):
        alpha_of(4.5, 3)


def test_omega_is_the_mean_of_a_simulation():
    """Not of the formula: accept drafts one by one with probability alpha."""
    rng, alpha, gamma, total = random.Random(0), 0.7, 4, 0
    for _ in range(20000):
        n = 0
        while n < gamma and rng.random() < alpha:
            n += 1
        total += n + 1
    assert total / 20000 == pytest.approx(omega(gamma, alpha), rel=0.01)


def test_a_step_by_hand():
    """dim 4, H 2, Hkv 1, D 2: q, o 16 each, k, v 8 each; ffn 3 * 12; two layers; output 20."""
    assert matrix_params(SMALL) == 2 * (16 + 16 + 8 + 8 + 36) + 20 == 188
    assert total_params(SMALL) == 188 + 20 + 5 * 4
    assert kv_bytes_per_token(SMALL) == 2 * 2 * 1 * 2 * 2 == 16
    t = forward_time(SMALL, ROUND, Workload(3, 10), T=2)  # 10 bytes/s, 500 FLOP/s
    assert t.weights == pytest.approx(188 * 2 / 10)
    assert t.linear_compute == pytest.approx(2 * 188 * 6 / 500)
    assert t.kv == pytest.approx(3 * 10 * 16 / 10)
    assert t.attention_compute == pytest.approx(4 * 2 * 2 * 2 * 10 * 6 / 500)
    assert (t.fixed, t.all_reduce) == (0.5, 0.0)
    per_token = 2 * (4 * 4 + 2 * (2 * 2 + 2 * 1) * 2 + 6 * 3) * 2 + 16 + 8 * 5
    assert t.activations == pytest.approx(6 * per_token / 10)
    assert t.total == pytest.approx(37.6 + 48.0 + 0.5 + t.activations)
    two = forward_time(SMALL, ROUND, Workload(3, 10, num_gpus=2), T=2)
    assert two.weights == pytest.approx(t.weights / 2)
    assert two.kv == t.kv  # one KV head: each GPU holds it
    assert two.all_reduce == pytest.approx(2 * 2 * (0.5 + 6 * 4 * 2 * (2 * 1 / 2) / 8))


def test_compute_counts_where_it_takes_longer():
    fast_memory = replace(ROUND, peak_bandwidth=1e9)
    t = forward_time(SMALL, fast_memory, Workload(3, 10))
    rest = t.fixed + t.activations
    assert t.total == pytest.approx(t.linear_compute + t.attention_compute + rest)


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
    lengths = [predict(LLAMA, A100, Workload(32, S, 8), STREAMING, 0.8).speedup
               for S in (2000, 8000, 32000, 128000)]  # fmt: skip
    assert lengths == sorted(lengths)
    batches = [predict(LLAMA, A100, Workload(B, 64000, 8), STREAMING, 0.8).speedup
               for B in (1, 8, 32, 128)]  # fmt: skip
    assert batches == sorted(batches) and batches[-1] > 1.3 * batches[0]


def test_break_even_acceptance_breaks_even():
    w = Workload(32, 32000, 8)
    p = predict(LLAMA, A100, w, STREAMING, 0.8)
    assert predict(LLAMA, A100, w, STREAMING, p.break_even).speedup == pytest.approx(1)
    assert break_even(1.0, 4.1, 3) is None  # a round of 4 tokens cannot pay for 4.1 steps
    assert break_even(1.0, 0.9, 3) == pytest.approx(0, abs=1e-9)


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
    n = winning_length(LLAMA, A100, w, STREAMING, 0.8)
    for length, wins in ((n, True), (n - 1, False)):
        p = predict(LLAMA, A100, replace(w, prefix_len=length), STREAMING, 0.8)
        assert (p.speedup > 1) == wins
    assert winning_length(LLAMA, A100, w, STREAMING, 0.0) is None


def test_the_winning_length_against_trying_all():
    """Also where a draft wins at short contexts, loses past a budget or window, and wins again."""
    rng, seen, most = random.Random(0), Counter(), 150
    for _ in range(150):
        windows = [rng.choice([None, None, 20, 60]) for _ in range(2)]
        target, small = (replace(SMALL, sliding_window=n, max_seq_len=9999) for n in windows)
        target, small = replace(target, dim=8, n_layer=4), replace(small, dim=1, n_layer=3)
        policy = rng.choice(["streaming", "streaming", "snapkv", "full"])
        model = small if policy == "full" else rng.choice([None, small])
        draft = Draft(policy, rng.choice([1, 3]), rng.choice([5, 60]), model, "", 8, 3)
        hw = replace(ROUND, layer_seconds=0.01, peak_flops=10 ** rng.uniform(3, 6))
        w = Workload(rng.choice([1, 9]), 1)
        alpha = rng.uniform(0.3, 1)
        if even := predict(target, hw, replace(w, prefix_len=60), draft, alpha).break_even:
            alpha = rng.choice([alpha, even * 0.998])  # just loses at a length of 60
        wins = [predict(target, hw, replace(w, prefix_len=n), draft, alpha).speedup > 1
                for n in range(1, most + 1)]  # fmt: skip
        tail = len(list(itertools.takewhile(bool, reversed(wins))))
        found = winning_length(target, hw, w, draft, alpha, most)
        assert found == (most - tail + 1 if tail else None)
        seen["never" if found is None else "always" if found == 1 else "later"] += 1
        seen["and before, and not between"] += tail > 0 and any(wins[: most - tail])
    assert len(seen) == 4 and min(seen.values()) >= 3


def test_what_drafting_costs():
    w, tiny = Workload(32, 32000, 8), MODELS["tinyllama-1.1b"]
    full = forward_time(LLAMA, A100, w).total
    streaming = draft_step(STREAMING, LLAMA, A100, w)
    assert streaming == forward_time(LLAMA, A100, w, 1, 512).total < full
    assert draft_step(Draft("streaming", 3, 512), LLAMA, A100, Workload(32, 100, 8)) < streaming
    snapkv = Draft("snapkv", 3, 512, select_every=8)
    extra = draft_step(snapkv, LLAMA, A100, w) - streaming
    assert extra == pytest.approx(selection(snapkv, LLAMA, A100, w) / 8 / 3) and extra > 0
    assert draft_step(replace(snapkv, select_every=0), LLAMA, A100, w) == streaming
    assert draft_step(Draft("ngram", 3), LLAMA, A100, w) == 0
    own = draft_step(Draft("streaming", 3, 512, tiny), LLAMA, A100, w)
    assert (
        forward_time(tiny, A100, w, 1, 512).total < own < streaming
    )  # re-anchoring costs something
    own_full = draft_step(Draft("full", 3, 0, tiny), LLAMA, A100, w)
    assert own_full == forward_time(tiny, A100, w).total > own


def test_the_plan_ranks_and_never_loses():
    drafts = candidates({"tiny": MODELS["tinyllama-1.1b"]}, (256, 512), range(1, 6))
    assert len(drafts) == 1 + 5 * (1 + 1 + 2 * 4)
    for w in (Workload(1, 256), Workload(32, 4000, 8), Workload(64, 64000, 8)):
        ranked = plan(LLAMA, A100, w, drafts)
        times = [p.seconds_per_token for p in ranked]
        assert times == sorted(times) and ranked[0].speedup >= 1
        assert PLAIN in [p.draft for p in ranked]
    own = [d for d in drafts if d.model is None]
    assert plan(LLAMA, A100, Workload(1, 256), own)[0].draft == PLAIN
    assert plan(LLAMA, A100, Workload(64, 64000, 8), drafts)[0].speedup > 1.4


def test_acceptance_comes_from_the_nearest_measurement():
    table = [Acceptance("streaming", False, b, s, a, "") for b, s, a in
             [(128, 4000, 0.5), (512, 4000, 0.7), (512, 64000, 0.6)]]  # fmt: skip
    for budget, length, alpha in [
        (128, 9, 0.5), (511, 9, 0.5), (600, 5000, 0.7), (999, 60000, 0.6)
    ]:  # fmt: skip
        draft = Draft("streaming", 3, budget)
        assert expected_acceptance(draft, Workload(1, length), table) == alpha
    assert expected_acceptance(Draft("ngram", 3), Workload(1, 9), table) is None
    assert expected_acceptance(Draft("streaming", 3, 127), Workload(1, 9), table) is None
    own = Draft("streaming", 3, 512, LLAMA)
    assert expected_acceptance(own, Workload(1, 9), table) is None


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_the_largest_batch_is_the_last_that_fits(gpus):
    """Against counting up, also where no row fits, one does, and where it fits to the byte."""
    w = Workload(1, 700, gpus)
    for model in (LLAMA, MODELS["qwen2.5-7b"]):
        for draft in (PLAIN, STREAMING, Draft("full", 3, 0, MODELS["llama-3.2-1b"])):

            def fits(rows, memory, model=model, draft=draft):
                return memory_bytes(model, replace(w, batch_size=rows), draft, 100) <= memory

            to_the_byte = memory_bytes(model, replace(w, batch_size=9), draft, 100)
            for memory in (1e9, to_the_byte - 1, to_the_byte, to_the_byte + 1, 24e9, 26.5e9):
                found = largest_batch(model, replace(A100, memory=memory), w, draft, 100)
                assert found == next(n for n in itertools.count() if not fits(n + 1, memory))
    assert largest_batch(MODELS["llama-3.1-70b"], A100, Workload(1, 32000)) == 0


def test_the_work_of_a_round_by_hand():
    """dim 4, q, k and v 8, ffn 3: 44 numbers of 2 bytes a token; 7 of a chunk, 3 * (1 + 2)."""
    activations = (7 + 9) * (4 * 4 + 2 * 8 + 4 * 3) * 2
    logits = 3 * 3 * 5 * 2
    probs = (3 * 2 * 5) + 5 * (3 * 3 * 5) + 3 * (3 * 5)  # the draft's; for logits; for rows
    assert work_bytes(SMALL, 3, 2, 7, 2, sampled=False) == activations + logits
    assert work_bytes(SMALL, 3, 2, 7, 2, sampled=True) == activations + logits + 4 * probs
    w = Workload(128, 8000)
    rest = (total_params(LLAMA) + 128 * (8000 + 1) * 65536) * 2
    assert memory_bytes(LLAMA, w) == rest + work_bytes(LLAMA, 128, 0, PREFILL_CHUNK, 2, True)
    more = memory_bytes(LLAMA, w, Draft("ngram", 8)) - memory_bytes(LLAMA, w)
    assert more > 3.5e9  # a vocabulary of 128k, and eight drafts to verify


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
    strategy = Strategy("streaming", gamma, 16) if gamma else Strategy()
    with torch.inference_mode():
        engine = Engine(model, 5, 40, strategy, sampling)
        engine.prefill([[1, 2, 3]] * 5, [30] * 5)
        measured = live_bytes(lambda: engine.round(gamma))
    itemsize = model.norm.weight.itemsize
    estimate = work_bytes(model.config, 5, gamma, 0, itemsize, not sampling.greedy)
    assert measured <= estimate <= 2 * measured


def test_the_work_of_a_prefill_is_enough_and_not_twice_too_much():
    """In 16 bits, where attention's scores are not kept."""
    import torch

    config = ModelConfig(dim=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, ffn_dim=700,
                         vocab_size=97, max_seq_len=500)  # fmt: skip
    model = Transformer(config).to(torch.bfloat16).requires_grad_(False)
    with torch.inference_mode():
        engine = Engine(model, 1, 400, Strategy(), Sampling())
        measured = live_bytes(lambda: engine.prefill_row(0, 390))
    estimate = work_bytes(config, 0, 0, engine.prefill_chunk, 2, False)
    assert measured <= estimate <= 2 * measured
    gpu = replace(CacheSpec.for_model(model, 1), device=torch.device("cuda"))
    assert gpu.prefill_chunk == PREFILL_CHUNK


def test_fit_recovers_a_device():
    truth = replace(HARDWARE["cpu"], flop_efficiency=0.31, bandwidth_efficiency=0.62,
                    layer_seconds=1.1e-4)  # fmt: skip
    model = MODELS["tinyllama-1.1b"]
    timings = [
        Timing(Workload(B, S), T, S, forward_time(model, truth, Workload(B, S), T, S).total)
        for B, S, T in [(1, 100, 1), (16, 4000, 1), (16, 500, 1), (16, 4000, 6), (1, 512, 512)]
    ]
    found, error = fit(model, HARDWARE["cpu"], timings)
    assert error < 0.01
    for w, T in [(Workload(8, 8000), 1), (Workload(4, 300), 200)]:
        expected = forward_time(model, truth, w, T).total
        assert forward_time(model, found, w, T).total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "path, n_rows, wrong, T_T, drafts, T_V, speedup",  # the bounds are what the project asks for
    [(TABLE3, 47, 4, 6, 8, 8, 6), (TABLE6, 4, 0, 6, 12, 6, 6)],
)
def test_the_papers_measurements_are_explained(path, n_rows, wrong, T_T, drafts, T_V, speedup):
    """One set of constants per GPU type for all of its rows; median errors in percent."""
    text = compare(read_measured(path))
    error = {name: float(percent) for name, percent in MEDIAN.findall(text)}
    assert error["T_T"] <= T_T and error["gamma T_D"] <= drafts
    assert error["T_V"] <= T_V and error["speedup"] <= speedup
    on_the_wrong_side = int(text.split("more than 0.05: ")[1].split()[0])
    assert on_the_wrong_side <= wrong and text.endswith(f"of {n_rows} rows")


def test_an_h200_is_an_h100_with_other_memory():
    h100 = HARDWARE["h100"]
    memory = {"name": "H200 SXM", "peak_bandwidth": 4800e9, "memory": 141e9}
    assert replace(h100, **memory) == HARDWARE["h200"]


def test_the_readme_shows_what_the_commands_print(capsys):
    """Its table is the output of the command above it, its errors those of `--measured`."""
    section = README.split("\n## The cost model\n")[1].split("\n## ")[0]
    shell, printed = re.findall(r"```(?:bash|text)\n(.*?)```", section, re.DOTALL)
    first, *measured = shell.replace("\\\n", " ").splitlines()
    assert main(shlex.split(first)[2:]) == 0
    assert capsys.readouterr().out == printed
    rows = re.findall(r"^\| \w+ \| (\d+) rows.*?\| (.*) \|$", section, re.MULTILINE)
    for command, (n_rows, errors) in zip(measured, rows, strict=True):
        assert main(shlex.split(command)[2:]) == 0
        out = capsys.readouterr().out
        assert [percent for _, percent in MEDIAN.findall(out)] == re.findall(r"([\d.]+)%", errors)
        assert out.endswith(f"of {n_rows} rows\n")


def test_fit_leaves_alone_what_the_timings_do_not_show():
    """Plain steps without grouped heads never wait for arithmetic."""
    model, truth = MODELS["llama-2-7b"], replace(A100, bandwidth_efficiency=0.4)
    timings = [Timing(w, 1, w.prefix_len, forward_time(model, truth, w).total)
               for w in (Workload(1, S) for S in (100, 1000, 4000))]  # fmt: skip
    found, error = fit(model, A100, timings)
    assert found.flop_efficiency == A100.flop_efficiency and error < 0.01


def test_fit_does_not_let_two_constants_run_off():
    """Steps as `--draft auto` times them; the bandwidth once grew to 1e13 times what it was."""
    model, cpu = MODELS["tinyllama-1.1b"], HARDWARE["cpu"]
    truth = replace(cpu, flop_efficiency=0.31, bandwidth_efficiency=0.62, layer_seconds=1.1e-4)
    timings = [
        Timing(Workload(4, S), T, S, forward_time(model, truth, Workload(4, S), T, S).total)
        for S in (100, 1000, 2000)
        for T in (1, 6)
    ]
    found, error = fit(model, cpu, timings)
    assert error < 0.005
    for name in ("flop_efficiency", "bandwidth_efficiency", "layer_seconds"):
        assert 0.5 < getattr(found, name) / getattr(truth, name) < 2


def test_fit_refuses_what_are_no_timings():
    with pytest.raises(ValueError, match="no timings to fit to"):
        fit(LLAMA, A100, [])
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            Timing(Workload(1, 100), 1, 100, seconds)


def test_the_readme_says_how_many_plain_steps_a_selection_takes():
    draft, hw, steps = Draft("snapkv", 3, 2048), HARDWARE["h100"], []
    for S, B in itertools.product((8192, 32768), (32, 64, 128)):  # those of its table
        w = Workload(B, S, 8)
        steps.append(selection(draft, LLAMA, hw, w) / forward_time(LLAMA, hw, w).total)
    text = " ".join(README.split())
    assert f"The cost model expects {min(steps):.1f} to {max(steps):.1f} on 8 H100" in text


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("cost_model.py: ")
    return err


def test_command_line(capsys):
    flags = ["--num_gpus", "8", "--batch_size", "32", "128", "--prefix_len", "8192", "32768"]
    assert main([*flags, "--hardware", "h100", "--draft_model", "llama-3.2-1b"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + 1 + 4 + 1 and "8 x H100 SXM" in out
    checkpoint = str(ROOT / "checkpoints" / "demo")
    assert main(["--checkpoint_path", checkpoint, "--hardware", "cpu", "--batch_size", "16"]) == 0
    assert main(["--measured", str(TABLE3)]) == 0


def test_it_needs_no_torch():
    code = "import sys, cost_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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
        (["--measured", "/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_unusable_flags_get_one_line(capsys, flags, words):
    assert main(flags) == 2
    assert words in one_line(capsys)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("gamma,", "gama,", "line 1: no column gamma"),
        (",8.27,8.7,0.95", ",fast,8.7,0.95", "line 2, column autoregressive_ms_per_token: 'fast'"),
        ("A100,8,1024,48", "V100,8,1024,48", "line 3, column gpu: 'V100'"),
        (",StreamingLLM,", ",H2O,", "line 2, column draft_method: 'H2O'"),
        ("9.55,2.19,", "9.55,-2,", "line 2, column tokens_per_round: '-2'"),
        ("A100,8,1024,32", "A100,8,1024,0", "line 2, column batch_size: '0'"),
        ("a,LLaMA-2-7B-32K,", "a,,", "line 2, column target: ''"),
    ],
)  # fmt: skip
def test_a_malformed_csv_is_refused_with_line_and_column(tmp_path, capsys, old, new, words):
    file = tmp_path / "m.csv"
    file.write_text(TABLE3.read_text().replace(old, new, 1))
    assert main(["--measured", str(file)]) == 2
    assert words in one_line(capsys)


def test_plot_says_what_is_missing_or_writes(tmp_path, capsys):
    status = main(["--num_gpus", "8", "--plot", str(tmp_path / "f.png")])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert status == 2 and "pip install matplotlib" in one_line(capsys)
    else:
        assert status == 0 and (tmp_path / "f.png").stat().st_size > 1000


def test_acceptance_of_a_measured_run_replaces_the_papers(tmp_path, capsys):
    run = {"plan": {"strategy": "ngram", "gamma": 4}, "outputs": [{"prompt_length": 7000}],
           "speculative": {"mean_acceptance_length": 3.0}}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    a = read_acceptance(path)
    assert (a.policy, a.own_model, a.budget, a.prefix_len) == ("ngram", False, 0, 7000)
    assert omega(4, a.alpha) == pytest.approx(3)
    assert main(["--acceptance", str(path), "--batch_size", "8", "--prefix_len", "8192"]) == 0
    assert "ngram" in capsys.readouterr().out


RUN = {
    "plan": {"strategy": "streaming", "gamma": 4, "draft_budget": 512},
    "outputs": [{"prompt_length": 7000}],
    "speculative": {"mean_acceptance_length": 3.0},
}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "TypeError"),
        ("[" * 100_000, "RecursionError"),
        ("\udcff", "UnicodeDecodeError"),
        (json.dumps(RUN | {"plan": {}}), "KeyError"),
        (json.dumps(RUN | {"speculative": {}}), "KeyError: 'mean_acceptance_length'"),
        (json.dumps(RUN | {"outputs": []}), "empty"),
        *(
            (json.dumps(RUN | {"plan": RUN["plan"] | change}), words)
            for change, words in [
                ({"predicted_speedup": 1.5}, "its plan has predicted_speedup"),
                ({"strategy": "low_norm"}, "draft 'low_norm' is unknown; known: streaming, snapkv"),
                ({"draft_budget": "9"}, "budget '9' must be a whole number in 0.."),
                ({"draft_budget": -5}, "budget -5 must be"),
                ({"gamma": 1}, "3.0 tokens per round is not in 1..2"),
                ({"gamma": "4"}, "TypeError"),
            ]
        ),
        *(
            (json.dumps(RUN | {"outputs": [{"prompt_length": n}]}), "prefix_len")
            for n in (0, -1, "7", 1.5, True, math.nan, 10**400)
        ),
    ],
)
def test_what_is_no_measured_run_is_refused_in_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["--acceptance", str(path)]) == 2
    line = one_line(capsys)
    assert "not the JSON of generate.py with a fixed --draft" in line and words in line


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


def test_a_sliding_window_bounds_what_a_step_reads():
    """And a draft step, and no memory: the cache holds the whole text."""
    model, short, long = MODELS["mistral-7b"], Workload(8, 4096), Workload(8, 32768)
    windowed = replace(model, sliding_window=4096)
    for T in (1, 5):
        assert forward_time(windowed, A100, long, T) == forward_time(model, A100, short, T)
        assert forward_time(windowed, A100, Workload(8, 100), T) == forward_time(
            model, A100, Workload(8, 100), T
        )
    for draft in (Draft("streaming", 3, 8192), Draft("full", 3, 0, windowed)):
        expected = forward_time(model, A100, short).total
        assert draft_step(draft, windowed, A100, long) == expected
        assert memory_bytes(windowed, long, draft) == memory_bytes(model, long, draft)
