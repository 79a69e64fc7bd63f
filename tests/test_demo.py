"""The table of all ways to draft: who has a line, and that all lines are the model's own text."""

import json

import pytest

import policies
from auto import Auto, Candidate
from demo import draft_length, measure_all
from generate import main
from measure import Job
from options import Options, parse_args
from policies import POLICIES, Policy, Strategy
from report import compared
from sampling import Sampling, row_seed
from spec_decode import Engine
from tests.reference import plain, plain_greedy, tiny_model
from tests.test_spec_decode import PROMPTS

GREEDY, SAMPLED, N = Sampling(), Sampling(0.8), 12
NAMES = ["plain", "streaming 128", "snapkv 128", "mixed 128", "ngram", "auto"]
SAMPLED_NAMES = ["plain", "streaming 128", "auto"]


def auto_of(engine: Engine) -> Auto:
    found = [Candidate(Strategy("ngram", 5)), Candidate(Strategy("mixed", 5))]
    return Auto(engine, found, (2, 5))


def first_words(lines: list[dict]) -> list[str]:
    """Names without the kind of draft weights, which this machine chooses, and auto's choice."""
    return [" ".join(line["name"].replace(":", "").split()[:2]) if line["strategy"] != "auto"
            else "auto" for line in lines]  # fmt: skip


def test_all_lines_are_the_models_own_text(monkeypatch):
    """Greedy ones, then sampled ones behind the same first tokens. Who cannot draft is left out."""
    add, said = Engine.add, []

    def no_room(engine, strategy, *more):
        if strategy.policy == "snapkv":
            raise ValueError("no room")
        return add(engine, strategy, *more)

    monkeypatch.setattr(Engine, "add", no_room)
    monkeypatch.setitem(POLICIES, "mine", Policy(policies.select_streaming, 1.0))
    model = tiny_model()
    engine = Engine(model, 4, 90, Strategy(), SAMPLED, seed=3)
    job = Job(PROMPTS, N, sampling=GREEDY)
    say = lambda *text, end="": said.extend(text)  # noqa: E731
    measured, lines = measure_all(Options(), engine, auto_of(engine), job, say)
    greedy = [plain_greedy(model, p, N) for p in PROMPTS]
    sampled = [
        answer[:1] + plain(model, [*prompt, answer[0]], N - 1, SAMPLED, row_seed(3, b))
        for b, (prompt, answer) in enumerate(zip(PROMPTS, greedy, strict=True))
    ]
    names = [*NAMES[:2], *NAMES[3:4], "mine 128", *NAMES[4:]]
    assert first_words(compared(lines)) == names + SAMPLED_NAMES
    assert "snapkv 128: no room" in [s.replace(" bf16", "") for s in said]
    assert [line.temperature for line in lines] == [0.0] * 6 + [0.8] * 3
    for line in lines:
        assert line.run.outputs == (sampled if line.temperature else greedy)
        assert line.plan["gamma"] in (0, 2, 5)
        assert bool(line.plan["gamma"]) == ("draft_step_ms" in line.step_ms)
        if line.plan["strategy"] not in ("none", "auto"):
            assert line.run.acceptance and line.plan["gamma"] == 5
    assert measured.baseline is lines[0].run and measured.main is lines[5].run
    assert measured.differences == [] and measured.setting["sampling"]["temperature"] == 0
    assert "candidates" in measured.setting["plan"]


@pytest.mark.parametrize("gammas, gamma", [((2, 5), 5), ((1, 3, 7, 12), 3), ((7,), 7)])
def test_all_lines_have_the_usual_number_of_drafts(gammas, gamma):
    engine = Engine(tiny_model(), 1, 20, Strategy(), GREEDY)
    assert draft_length(Auto(engine, [], gammas)) == gamma


def test_a_demo_is_what_says_nothing_of_drafts():
    """How rows sample, how many there are, and where: all that stays one."""
    for flags in ([], ["--temperature", "0.5"], ["--batch_size", "3", "--kv_dtype", "bfloat16"],
                  ["--json", "-", "--no-compile", "--seed", "5"]):  # fmt: skip
        assert parse_args(flags).is_demo and parse_args(flags).max_new_tokens == 64
    assert parse_args(["--max_new_tokens", "256"]).max_new_tokens == 256
    for flags in (["--prompt", "5"], ["--draft", "streaming"], ["--gamma", "5"], ["--compare"],
                  ["--draft_budget", "64"], ["--explain"], ["--check_lossless"], ["--interactive"],
                  ["--no-compare"], ["--draft_weights", "same"]):  # fmt: skip
        assert not parse_args(flags).is_demo and parse_args(flags).max_new_tokens == 256
    assert parse_args([]).samplings == (GREEDY, SAMPLED)
    assert parse_args(["--temperature", "0.5"]).samplings == (Sampling(0.5),)
    assert parse_args(["--draft", "ngram"]).samplings == (GREEDY,)


def test_from_the_command_line(checkpoint, capsys):
    given = ["--checkpoint_path", str(checkpoint), "--no-compile", "--batch_size", "2"]
    assert main([*given, "--max_new_tokens", "9", "--json", str(checkpoint / "out.json")]) == 0
    result = json.loads((checkpoint / "out.json").read_text())
    runs, out = result["runs"], capsys.readouterr().out
    assert first_words(runs) == NAMES + SAMPLED_NAMES
    assert all(run["identical_rows"] == run["rows"] == 2 for run in runs)
    assert {"environment", "plan", "baseline", "speculative", "speedup", "identical"} < {*result}
    assert runs[5]["decode_seconds"] == result["speculative"]["decode_seconds"]
    assert runs[0]["decode_seconds"] == result["baseline"]["decode_seconds"]
    assert out.count("2/2") == 9 and "\ngreedy\n" in out and "\ntemperature 0.8\n" in out
    assert out.splitlines()[-1].split(": try ")[1].startswith("python generate.py --draft ")
