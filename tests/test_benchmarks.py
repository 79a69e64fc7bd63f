"""The benchmarks run, at toy sizes, and write what they say; their figures mean nothing here."""

import importlib
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from batch import Request
from benchmarks import load_memory, synthetic
from benchmarks.strategies import mixed_markdown
from benchmarks.synthetic import SyntheticEngine, random_prompts
from checkpoint import DEMO_CHECKPOINT
from config import MODELS, ModelConfig, total_params
from cost_model import Prediction
from cost_model import Strategy as PlannedStrategy
from families import load_config
from measure import decode
from policies import Strategy
from prompts import DEMO_MODULES, module_source
from roofline import HARDWARE, Workload
from sampling import Sampling
from tests.reference import tiny_model
from tests.test_spec_decode import PROMPTS
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = load_config(DEMO_CHECKPOINT)


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Runs a benchmark's command in this process, which has torch imported; its JSON file."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)  # other tests' blocks stay compiled

    def run(name: str, *flags: str) -> Path:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *flags, "--out", str(out)])
        importlib.import_module(f"benchmarks.{name}").main()
        return out

    return run


@pytest.mark.parametrize("name, keys", [
    ("strategies", {"defaults", "mixed", "topics", "recall", "long", "quarters", "grid"}),
    ("auto", {"cells"}),
    ("scaling", {"model", "strategy", "cells", "calibration"}),
    ("offline", {"runs", "sharing", "prediction_error"}),
    ("peers", {"programs", "failed"}),
    ("exact", {"without", "exact"}),
])  # fmt: skip
def test_smoke(run_main, name, keys):
    out = run_main(name, "--smoke")
    result = json.loads(out.read_text())
    assert keys | {"command", "date", "environment"} <= result.keys()
    table = [*filter(None, out.with_suffix(".md").read_text().splitlines())]
    assert len(table) > 3 and all(line.count("|") == table[0].count("|") for line in table)
    if name == "strategies":
        for workload in result["grid"].values():
            assert all(r["identical"] == r["rows"] == 2 for r in workload["results"])
        for workload in result["mixed"].values():
            assert workload["identical"] == workload["outputs"] == 4 * 2
        assert len(mixed_markdown(result["mixed"]).splitlines()) == 2 + 3
    elif name == "offline":
        check_offline(result)
    elif name == "peers":
        check_peers(result)
    elif name == "scaling":
        check_scaling(result)


def check_offline(result: dict) -> None:
    """Five requests in two rows: the last static batch has one that is idle."""
    assert result["identical"] == 5 and result["sharing"]["identical"] == 3
    runs = {name: repeats[0] for name, repeats in result["runs"].items()}
    assert len(runs) == 4 and len({r["decoded_tokens"] for r in runs.values()}) == 1
    for how in ("drafted", "plain"):
        ours, theirs = runs[f"refilled, {how}"], runs[f"static, {how}"]
        assert ours["row_rounds"] == theirs["row_rounds"] and ours["rounds"] < theirs["rounds"]
        assert ours["busy_share"] > theirs["busy_share"]
    assert runs["static, plain"]["row_rounds"] == runs["static, plain"]["decoded_tokens"]


def check_scaling(result: dict) -> None:
    """Both batch sizes decode the same texts; a batch of one row waits for no other."""
    one, two = result["cells"]
    assert (two["batch_size"], two["length"], two["prompt_tokens"]) == (2, 40, 32)
    for c in (one, two):
        assert c["identical"] == c["outputs"] == 6 and c["predicted"]["speedup"] > 0
        runs = {name: way["repeats"][0] for name, way in c["ways"].items()}
        assert [runs[name]["n_tokens"] for name in ("plain", "streaming", "auto")] == [14] * 3
        assert runs["plain"]["row_rounds"] == 14 and runs["streaming"]["row_rounds"] < 14
        assert sum(c["ways"]["auto"]["chose"].values()) == 2 // c["batch_size"]
    drafted = [c["ways"]["streaming"] for c in (one, two)]
    assert drafted[0]["tokens_per_round"] == drafted[1]["tokens_per_round"]
    assert drafted[0]["row_speedup"] == pytest.approx(drafted[0]["batch_speedup"])


def check_peers(result: dict) -> None:
    """Whatever is installed finds this program's tokens; what is not says so."""
    done, failed = result["programs"], result["failed"]
    assert done.keys() >= {"this program", "gpt-fast style", "gpt-fast style, unfused"}
    assert len(done) + len(failed) == 11
    assert all("No module named" in why for why in failed.values())
    for r in done.values():
        assert r["identical"] == r["rows"] == 2 and r["same_tokens"] == [6, 6]
        assert r["ms_per_step"] > 0 and r["tokens_per_s"] > 0
    plain, drafted = (r for name, r in done.items() if name.startswith("this program"))
    assert plain["speedup"] == 1 and drafted["steps"] <= plain["steps"] == 5


def scaling_cell(B: int, S: int, times: list[float]) -> dict:
    """As benchmarks/scaling.py has it, where these were T_T, T_D and T_V(5)."""
    from benchmarks.scaling import STEPS

    speedups = {"row_speedup": 1.5, "batch_speedup": 1.2}
    return {"batch_size": B, "length": S, "prompt_tokens": S,
            "workload": asdict(Workload(B, S, 1, 4)),
            "steps": {name: 1e3 * t for name, t in zip(STEPS, times, strict=True)},
            "ways": {"streaming": {"tokens_per_round": 3.5} | speedups,
                     "auto": {"chose": {"no draft": 1}, "predicted_speedup": 1.0} | speedups},
            "outputs": 2, "identical": 2}  # fmt: skip


def scaling_result() -> dict:
    """A grid as a device would give it that drafts 1.4 times slower than the formula says."""
    draft = Strategy("streaming", 5, 128)
    hw = replace(HARDWARE["cpu"], bandwidth_efficiency=0.5, flop_efficiency=0.2)
    planned = PlannedStrategy("streaming", 5, 128)
    cells = []
    for B, S in product((1, 4, 16), (500, 1000, 4000)):
        w = Workload(B, S, 1, 4)
        t_target, t_draft, t_verify = Prediction(DEMO, hw, w, planned, 0.0).seconds
        cells.append(scaling_cell(B, S, [t_target, 1.4 * t_draft, t_verify]))
    machine = {"device": "cpu", "device_name": "a CPU", "threads": 2}
    return {"model": asdict(DEMO), "strategy": asdict(draft), "environment": machine,
            "date": "today", "cells": cells}  # fmt: skip


def test_scaling_predicts_the_grid_from_its_corners():
    from benchmarks.scaling import predict

    result = scaling_result()
    middle = next(c for c in result["cells"] if (c["batch_size"], c["length"]) == (4, 1000))
    t_target, t_draft, t_verify = (t / 1e3 for t in middle["steps"].values())
    middle["steps"]["target_step_ms"] *= 3  # what no corner shows is not predicted
    predict(result)
    assert result["calibration"]["cells"] == [[1, 500], [1, 4000], [16, 500], [16, 4000]]
    assert result["calibration"]["factors"]["draft_step_ms"] == pytest.approx(1.4, rel=0.02)
    told = middle["predicted"]
    speedup = 3.5 * t_target / (5 * t_draft + t_verify)
    assert told["speedup"] == pytest.approx(speedup, rel=0.02)
    assert told["speedup_by_own_steps"] == pytest.approx(3 * speedup)


def test_scaling_keeps_what_it_has_when_it_is_stopped_and_draws_it_again(run_main, monkeypatch):
    scaling = importlib.import_module("benchmarks.scaling")
    measured = [scaling_result()["cells"][0]]

    class Stopped:
        def __init__(self, *sizes) -> None:
            self.sizes = sizes

        def measure(self, *texts) -> dict:
            if not measured:
                raise KeyboardInterrupt
            return measured.pop()

    monkeypatch.setattr(scaling, "Cell", Stopped)
    out = run_main("scaling", "--smoke")
    assert len(json.loads(out.read_text())["cells"]) == 1
    beside = [out.with_suffix(end) for end in (".md", ".streaming.svg", ".auto.svg")]
    drawn = {path: path.read_text() for path in (out, *beside)}
    for path in beside:
        path.unlink()
    run_main("scaling", "--draw", str(out))
    assert drawn == {path: path.read_text() for path in (out, *beside)}


def test_the_texts_of_scaling_end_at_the_same_place_and_are_different():
    from benchmarks.scaling import texts

    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    rows = texts(tokenizer, 22, 700)
    assert {len(ids) for ids in rows} == {700} and len({*map(tuple, rows)}) == 22
    assert tokenizer.decode(rows[0] + rows[20]) in module_source(DEMO_MODULES[0])


def test_a_program_that_fails_in_its_process_is_told_in_one_line():
    from benchmarks.peers import caller

    with ExitStack() as stack, pytest.raises(RuntimeError, match="^KeyError: 'no program'$"):
        caller("no program", None, stack)()


def test_usual_lengths_are_those_of_rows_that_run():
    """A request with a long answer is seen in more rounds."""
    from benchmarks.offline import predicted, usual_lengths  # offline.py is the program's, too

    requests = [Request([1] * 10, 31), Request([1] * 100, 11), Request([1] * 500, 1)]
    lengths = usual_lengths(requests, 4)
    assert sorted(lengths) == [16, 26, 36, 106]
    steps = {"target_step_ms": 40.0, "draft_step_ms": 2.0, "verify_ms": 50.0}
    assert predicted(steps, 5, 3.0) == pytest.approx(40 * 3 / (5 * 2 + 50))


def test_the_offline_requests_are_written_for_the_program(tmp_path):
    from benchmarks.offline import SMOKE, mixed_requests, uniform, write_prompts

    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    requests = mixed_requests(tokenizer, SMOKE, uniform)
    write_prompts(requests, tokenizer, tmp_path / "in")
    lines = [json.loads(line) for line in (tmp_path / "in").read_text().splitlines()]
    assert [line["max_new_tokens"] for line in lines] == [r.max_new_tokens for r in requests]
    texts = [tokenizer.decode(r.prompt[1:]) for r in requests]
    assert [line["prompt"] for line in lines] == texts and len({line["id"] for line in lines}) == 5


def test_load_memory_measures_a_sharded_checkpoint(monkeypatch):
    """Too small to say anything about memory; that is what the benchmark itself is for."""
    monkeypatch.setitem(MODELS, "tiny", ModelConfig(256, 2, 4, 2, 64, 700, 9999, 500))
    r = load_memory.measure("tiny", 3, "bfloat16", "float32")
    assert r["n_shards"] == 3 and r["seconds"] > 0
    assert r["model_bytes"] == 4 * total_params(MODELS["tiny"])
    assert r["largest_shard_bytes"] < r["model_bytes"] / 2
    assert r["peak_growth_bytes"] > 0.9 * r["model_bytes"]


def test_gpu_benchmark_runs_at_toy_sizes_on_the_cpu(run_main, capsys):
    out = run_main("gpu", "--smoke")
    result = json.loads(out.read_text())
    done = {key: entry["result"] for key, entry in result["parts"].items()}
    assert "skipped" in done["tests of texts"]["last_line"]
    assert "test_cuda.py" in out.with_suffix(".tests.txt").read_text()
    assert done["demo float32"]["identical"] and done["demo exact"]["identical"]
    at = " at (2, 300)"
    assert {"T_T", "T_V(2)"} <= done["steps" + at].keys() >= {"replay_over_kernels"}
    assert done["all verifications" + at].keys() == {"T_V(1)", "T_V(2)"}
    assert done["all drafts" + at].keys() == {"T_D(16)", "T_D(32)"}
    assert done["baselines" + at]["gpt_fast_style_ms"] > 0
    for policy, rates in {"streaming": [0.81, 0.9], "snapkv": [0.895, 0.95]}.items():
        for weights in ("", " int8"):
            rounds = done[f"rounds {policy}{weights}{at}"]
            assert [run["synthetic_acceptance"] for run in rounds["runs"]] == rates
            assert rounds["gamma_0_beside_a_drafter"] > 0
    exact = done["exact" + at]
    assert exact["exact_rows_with_equal_bits"] == exact["rows"] == 2 and exact["exact_repeats"]
    assert len(done["kernel of plain steps" + at]) == 6
    lines = out.with_suffix(".md").read_text().splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
    capsys.readouterr()
    run_main("gpu", "--smoke")  # again: nothing is left to do
    assert json.loads(out.read_text())["parts"] == result["parts"]
    assert capsys.readouterr().out.strip().endswith("0 parts are left")
    if not torch.cuda.is_available():
        command = [sys.executable, "benchmarks/gpu.py"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 1 and "torch sees no GPU here" in ended.stderr


def test_gpu_parts_survive_each_other_and_are_tried_again_last(tmp_path, monkeypatch):
    """One fails, one has no time; the next run begins with what was never tried."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    def fail(bench, point):
        raise RuntimeError("out of luck")

    bench = gpu.Bench(True, tmp_path / "out.json")
    bench.smoke = False  # else a failure ends everything
    every = [gpu.Part("bad", 1, fail), gpu.Part("long", 900, lambda bench, point: {}),
             gpu.Part("good", 1, lambda bench, point: {"n": 3})]  # fmt: skip
    result = {"parts": {}}
    gpu.perform(bench, every, result, time.monotonic() + 60)
    saved = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert saved["bad"]["failed"] == "RuntimeError: out of luck" and "long" not in saved
    assert saved["good"]["result"] == {"n": 3} and saved["good"]["seconds"] < 1
    assert [part.name for part in gpu.waiting(every, result["parts"])] == ["long", "bad"]


def test_the_gpu_plan_begins_with_a_run_of_its_own(monkeypatch):
    """What decides fits into nine minutes; two batches of parts have no name in common."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    parts = gpu.parts(smoke=False)
    assert len({part.key for part in parts}) == len(parts)
    first = [part.key for part in parts].index("rounds snapkv fp8 at (24, 32768)")
    assert sum(part.seconds for part in parts[: first + 1]) <= 9 * 60


def test_a_time_out_does_not_lose_what_the_tests_printed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    log = tmp_path / "log.txt"
    assert gpu.run_logged(["sh", "-c", "echo one; echo two >&2; exec sleep 60"], log, 1.0) is None
    assert log.read_text() == "one\ntwo\n"
    assert gpu.run_logged(["sh", "-c", "echo three; exit 3"], log, 60) == 3
    assert log.read_text() == "three\n"


def synthetic_engine(n_rows: int, **options) -> SyntheticEngine:
    strategy = Strategy("streaming", 3, 20, 3)
    return SyntheticEngine(tiny_model(), n_rows, 270, strategy, Sampling(), **options)


def test_synthetic_acceptance_has_the_asked_rate(monkeypatch):
    """A draft stays where its noise is below the rate's quantile and all before it stayed."""
    engine = synthetic_engine(4, rate=0.5)
    engine.prefill(PROMPTS, [60] * 4)
    engine.refresh()
    draft = engine.draft(3)
    z = torch.tensor([[0.3, 0.3, 0.3], [0.3, 0.4, 0.3], [0.4, 0.3, 0.3], [0.36, 0.3, 0.37]])
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "noise", lambda keys, n_vocab: z[..., None])
        assert engine.decide(draft)[0].tolist() == [3, 1, 0, 2]
    for rate, rounds in ((0.0, 59), (1.0, 15)):  # of 59 tokens behind the first one
        engine.accept_at(rate)
        engine.rewind()
        stats = decode(engine)
        assert stats.draft_acceptance_rate == rate and stats.rounds == rounds


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="must be in 0..1"):
        synthetic_engine(1, rate=rate)


def test_made_up_prompts_fill_the_caches_of_their_rows():
    engine = synthetic_engine(2)
    engine.prefill(random_prompts([30, 60], 97), [9, 9])
    assert engine.batch.prompt_len.tolist() == [30, 60]
    for buffer in engine.full.k + engine.full.v:
        assert buffer[:, :, :60].std(dim=-1).min() > 0.1


def test_floor_measures_steps_against_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import floor

    monkeypatch.setattr(floor, "NEW_TOKENS", 20)
    r = floor.measure(tiny_model(), [30, 50], Strategy("streaming", 2, 20), 0.9, repeats=2)
    assert len(r["target_step_over_floor_by_repeat"]) == 2
    assert r["target_step_over_floor"] > 0 and r["speedup"] > 0
    assert 2 < r["mean_acceptance_length"] <= 3
    assert not r["environment"]["compiled"]
