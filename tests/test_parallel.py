"""Several ranks are one model: the text of one process, one decision, one end.

`worlds.py` runs the cases, alone and on two and four ranks, with gloo on a CPU.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from config import MODELS, ModelConfig, one_rank, output_rows, total_params
from families import load_config
from parallel import begun_by, own_device
from roofline import HARDWARE, Workload, forward_time, moved_bytes, with_link

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, dict]:
    """What each process of each world has come to, by the name of its file."""
    folder = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, ROOT / "tests" / "worlds.py", folder]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def ranks(worlds: dict[str, dict], kind: str = "") -> list[tuple[str, list, list]]:
    """Of every case of that kind and every rank: a name, what came of it, and of it alone."""
    names = ("2-0", "2-1", "4-0", "4-1", "4-2", "4-3")
    return [
        (f"{name}, {case}", result, worlds["alone"][case])
        for name in names
        for case, result in worlds[name].items()
        if case.startswith(kind)
    ]


def test_texts_are_those_of_one_process(worlds):
    differing = [
        name
        for kind in ("strategy", "draft model", "heads", "sampled")
        for name, result, alone in ranks(worlds, kind)
        if result[0] != alone[0]
    ]
    assert not differing
    kept = {name: result[1] for name, result, _ in ranks(worlds, "strategy")}
    assert all(sum(n[1:]) for name, n in kept.items() if not name.endswith(("none", "ngram")))


def test_whole_kv_heads_select_as_one_process_does(worlds):
    """A rank that shares a KV head with another selects by its own query heads."""
    whole = ("2-0, strategy", "2-1, strategy", "2-0, heads (4, 4)", "4-3, heads (28, 4)")
    found = [r for r in ranks(worlds) if r[0].startswith(whole)]
    assert len(found) > 14 and all(result == alone for _, result, alone in found)


def test_families_say_what_transformers_says(worlds):
    found = ranks(worlds, "family")
    assert len({name.split("family ")[1] for name, *_ in found}) == 9
    assert [name for name, result, alone in found if result != alone or not result[1]] == []


def test_compiled_blocks_hold_collectives(worlds):
    for rank in ("2-0", "2-1"):
        assert worlds[rank]["compiled"] == worlds["alone"]["compiled"]


def test_clocks_that_differ_decide_the_same(worlds):
    for n in (2, 4):
        decided = [worlds[f"{n}-{rank}"]["auto"] for rank in range(n)]
        assert all(d == decided[0] for d in decided)
        assert decided[0][0] == worlds["alone"]["auto"][0]
        seconds, bandwidth = json.loads(decided[0][1])[2]
        preset = HARDWARE["cpu"]
        assert seconds != preset.all_reduce_seconds and bandwidth != preset.link_bandwidth


def test_ranks_agree(worlds):
    differ = "it is not the same on all ranks: they would wait for each other"
    assert worlds["alone"]["agreements"] == [3.0, 3.0, ["a", 0], "same"]
    for n in (2, 4):
        for rank in range(n):
            expected = [3.0, 4.0 - n, ["a", 0], differ]
            assert worlds[f"{n}-{rank}"]["agreements"] == expected
    assert worlds["2-0"]["file"] == worlds["2-1"]["file"] == worlds["alone"]["file"] == [["a"]]


def test_heads_that_do_not_divide_are_refused_by_name():
    config = ModelConfig(40, 2, 12, 4, 10, 56, 97)
    assert one_rank(config, 2) == replace(config, n_head=6, n_kv_head=2, ffn_dim=28, n_ranks=2)
    assert one_rank(config, 12) == replace(config, n_head=1, n_kv_head=1, ffn_dim=5, n_ranks=12)
    for n in (3, 5, 6, 24):
        with pytest.raises(ValueError, match=f"12 query heads and 4 KV heads .* {n} ranks; take"
                                             " 1, 2, 4, 12$"):  # fmt: skip
            one_rank(config, n)
    with pytest.raises(ValueError, match="--device cuda:1: several processes need several"):
        own_device("cuda:1")


def test_one_rank_of_eight_is_a_model_of_its_own():
    part = load_config(Path("random:llama-3.1-8b/8"))
    assert (part.n_head, part.n_kv_head, part.ffn_dim, part.vocab_size) == (4, 1, 1792, 16032)
    assert part.n_ranks == 1
    assert load_config(Path("random:llama-3.1-8b/1")) == MODELS["llama-3.1-8b"]
    wrong = {"x/8": "'x' is unknown", "llama-3.1-8b/x": "'x' is no number of ranks",
             "llama-3.1-8b/0": "'0' is no number", "llama-3.1-8b/3": "take 1, 2, 4"}  # fmt: skip
    for name, why in wrong.items():
        with pytest.raises(ValueError, match=why):
            load_config(Path(f"random:{name}"))


def test_a_rank_costs_its_share():
    whole, hw = MODELS["llama-3.1-8b"], HARDWARE["h100"]
    part = one_rank(whole, 8)
    theirs = forward_time(whole, hw, Workload(64, 32000, num_gpus=8), 5)
    ours = forward_time(part, hw, Workload(64, 32000), 5)
    for name in ("weights", "linear_compute", "kv", "attention_compute", "all_reduce", "fixed"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6)
    assert output_rows(part) == 16032
    table = whole.dim * whole.vocab_size
    assert total_params(part) == pytest.approx((total_params(whole) - table) / 8 + table, rel=1e-3)


def test_the_link_explains_two_timed_all_reduces():
    link = replace(HARDWARE["h100"], all_reduce_seconds=2e-5, link_bandwidth=3e10)

    def seconds(n_bytes: int) -> float:
        return link.all_reduce_seconds + moved_bytes(n_bytes, 4) / link.link_bandwidth

    found = with_link(HARDWARE["h100"], 4, {n: seconds(n) for n in (9000, 5 * 10**6)})
    assert found.all_reduce_seconds == pytest.approx(2e-5)
    assert found.link_bandwidth == pytest.approx(3e10)
    noisy = with_link(link, 4, {9000: 5e-5, 5 * 10**6: 4e-5})  # the larger was faster
    assert 0 < noisy.all_reduce_seconds < 5.1e-5 and noisy.link_bandwidth > 1e13
    with pytest.raises(ValueError, match="took 0.0 s"):
        with_link(link, 4, {9000: 0.0, 5 * 10**6: 4e-5})


def test_a_rank_loads_its_share_only(worlds):
    """And mapped pages of the files are counted: columns of a tensor are on all of its pages."""
    held, share, anonymous, peak, largest = worlds["alone"]["memory"]
    assert held == share and anonymous < 1.05 * share
    assert peak < share + 1.2 * largest


ENDS = {  # how a rank ends, and what is said of it
    "raise": "generate.py: rank 1 cannot go on",
    "kill": "generate.py: another rank has ended",
    "interrupt": "generate.py: interrupted",
}


LONG = ("--no-compile", "--draft", "none", "--batch_size", "1", "--max_new_tokens", "3000",
        "--max_context", "6000", "--prompt", "a", "--ignore_eos")  # fmt: skip


def torchrun(*command: object) -> list[object]:
    """Of two processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            *command]  # fmt: skip


def test_what_an_interruption_sets_off_is_one():
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise UnboundLocalError
    except UnboundLocalError as e:
        assert type(begun_by(e)) is KeyboardInterrupt
    assert begun_by(mine := ValueError()) is mine


def test_one_rank_ends_all(tmp_path):
    """Within 10 seconds, with one line besides those of torchrun, and a status that is not 0."""
    running = {}
    for how in ENDS:
        command = torchrun(ROOT / "tests" / "ends.py", how, tmp_path / how, *LONG)
        out = (tmp_path / f"{how}.log").open("w")
        running[how] = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)
    while any(process.poll() is None for process in running.values()):
        time.sleep(0.1)
        for how, process in running.items():
            ended = process.poll() is not None
            since = float((tmp_path / how).read_text() or "inf") if (tmp_path / how).exists() else 0
            if not ended and since:
                assert time.time() < since + 10, how
    for how, said in ENDS.items():
        log = (tmp_path / f"{how}.log").read_text()
        assert running[how].returncode != 0 and log.count(said) == 1, log
        assert log.count("generate.py: ") == 1, log
