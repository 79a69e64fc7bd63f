"""The roofline: a forward by hand, layers with windows, and constants found from timings."""

import math
from dataclasses import replace

import pytest

from config import MODELS, ModelConfig, kv_bytes_per_token, matrix_params, total_params
from roofline import (
    HARDWARE,
    Hardware,
    Timing,
    Workload,
    draft_lengths,
    fit,
    forward_time,
    layer_windows,
)

LLAMA, A100 = MODELS["llama-3.1-8b"], HARDWARE["a100"]
# A device and a model whose numbers can be worked out by hand.
ROUND = Hardware("round", 1000.0, 100.0, 1e6, flop_efficiency=0.5, bandwidth_efficiency=0.1,
                 layer_seconds=0.25, all_reduce_seconds=0.5, link_bandwidth=8.0)  # fmt: skip
SMALL = ModelConfig(dim=4, n_layer=2, n_head=2, n_kv_head=1, head_dim=2, ffn_dim=3, vocab_size=5,
               max_seq_len=100)  # fmt: skip


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


def test_an_h200_is_an_h100_with_other_memory():
    h100 = HARDWARE["h100"]
    memory = {"name": "H200 SXM", "peak_bandwidth": 4800e9, "memory": 141e9}
    assert replace(h100, **memory) == HARDWARE["h200"]


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


def test_a_sliding_window_bounds_what_a_step_reads():
    model, short, long = MODELS["mistral-7b"], Workload(8, 4096), Workload(8, 32768)
    windowed = replace(model, sliding_window=4096)
    for T in (1, 5):
        assert forward_time(windowed, A100, long, T) == forward_time(model, A100, short, T)
        within = Workload(8, 100)
        assert forward_time(windowed, A100, within, T) == forward_time(model, A100, within, T)


def test_every_layer_reads_its_own_window():
    """Layer by layer, as models of one layer: what is read and computed is their sum."""
    one = replace(SMALL, n_layer=1)
    four = replace(SMALL, n_layer=4, sliding_window=8, full_every=3)
    windows = layer_windows(four)
    assert windows == [8, 8, math.inf, 8]
    for length in (1, 8, 9, 70):
        t = forward_time(four, ROUND, Workload(3, length), T=2)
        seen = [min(length, window) for window in windows]
        layers = [forward_time(one, ROUND, Workload(3, n), T=2) for n in seen]
        assert t.kv == pytest.approx(sum(layer.kv for layer in layers))
        attention = sum(layer.attention_compute for layer in layers)
        assert t.attention_compute == pytest.approx(attention)
        assert t.weights == forward_time(four, ROUND, Workload(3, 70), T=2).weights
        assert forward_time(four, ROUND, Workload(3, 99), 2, context=length) == t


@pytest.mark.parametrize("G, gammas", [
    (1, (1, 3, 12)), (2, (1, 3, 7, 12)), (3, (1, 3, 4, 9, 12)), (4, (1, 3, 7, 12)),
    (7, (1, 3, 8)), (8, (1, 3, 7)), (16, (1, 3)), (64, (1, 3)),
])  # fmt: skip
def test_on_cuda_drafts_fill_a_tile_of_queries(G, gammas):
    assert draft_lengths("cuda", G) == gammas
    assert draft_lengths("cpu", G) == (2, 5, 12)
