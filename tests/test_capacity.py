"""What a memory holds: to the row and to the token, and who is fastest then."""

from dataclasses import replace

import pytest

from capacity import LONGEST, fill, longest_text, main
from config import MODELS
from cost_model import PLAIN, all_strategies, memory_bytes
from roofline import HARDWARE, Workload

LLAMA, H200 = MODELS["llama-3.1-8b"], HARDWARE["h200"]
STRATEGIES = all_strategies({}, (512, 2048), (2, 5), ("same", "fp8"))


def test_rows_fit_and_one_more_does_not():
    w = Workload(1, 32768, kv_itemsize=1)
    full = fill(LLAMA, H200, w, STRATEGIES)
    assert full[0].prediction.strategy == PLAIN and len(full) > 5
    for one in full:
        sizes = (replace(w, batch_size=one.n_rows + more) for more in (0, 1))
        fits, more = (memory_bytes(LLAMA, size, one.prediction.strategy) for size in sizes)
        assert fits <= H200.memory < more


def test_the_fastest_makes_the_most_tokens_with_the_rows_that_it_leaves():
    """A draft's caches and weights cost rows: none has more than plain decoding."""
    full = fill(LLAMA, H200, Workload(1, 32768), STRATEGIES)
    speeds = [one.tokens_per_second for one in full[1:]]
    assert speeds == sorted(speeds, reverse=True)
    assert all(one.n_rows <= full[0].n_rows for one in full[1:])
    best = full[1]
    p = best.prediction
    plain_seconds = p.seconds[0]
    assert p.w.batch_size == best.n_rows < full[0].n_rows
    assert best.tokens_per_second == pytest.approx(p.speedup * best.n_rows / plain_seconds)


def test_nothing_is_known_of_a_draft_without_an_acceptance():
    full = fill(LLAMA, H200, Workload(1, 32768), STRATEGIES, acceptance=())
    assert [one.prediction.strategy for one in full] == [PLAIN]
    assert fill(MODELS["llama-3.1-70b"], H200, Workload(1, 100), []) == []


@pytest.mark.parametrize("B", [1, 8, 100])
def test_the_longest_text_fits_and_one_token_more_does_not(B):
    w = Workload(B, 1)
    n = longest_text(LLAMA, H200, w)
    fits, more = (memory_bytes(LLAMA, replace(w, prefix_len=m)) for m in (n, n + 1))
    assert fits <= H200.memory < more
    assert longest_text(MODELS["llama-3.1-70b"], H200, w) == 0
    assert longest_text(LLAMA, replace(H200, memory=1e18), w) == LONGEST


def test_the_command_says_it_in_two_tables(capsys):
    flags = ["--hardware", "h200", "--prefix_len", "32768", "10000000", "--batch_size", "1", "8"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    S, rows, speed, *_, more_rows, more_speed, gain = lines[2].split()
    assert (S, lines[3].split()) == ("32768", ["10000000", "0"])
    assert int(rows) >= int(more_rows) and float(gain) > 1
    numbers = [float(text.replace(",", "")) for text in (speed, more_speed)]
    assert numbers[1] / numbers[0] == pytest.approx(float(gain), rel=0.01)
    assert [text.split(":")[0].strip() for text in lines[-2:]] == ["1 rows", "8 rows"]
    assert main(["--model", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("capacity.py: model 'nobody' is unknown")
