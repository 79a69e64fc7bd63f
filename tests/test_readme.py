"""The documents: their numbers are those of raw files, their commands run, their links lead on."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import cost_model
import generate
import options
from benchmarks import blocks, figures, one_round, paper
from policies import Strategy
from prompts import read_jsonl
from sampling import Sampling
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tests.test_spec_decode import PROMPTS
from tokenizer import NumberTokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in figures.DOCUMENTS}
README = TEXTS["README.md"]
MARKED = ("needs a GPU", "needs a download", "takes hours")
AWAITED: set[str] = set()  # links to what is not written yet
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?")


@pytest.mark.parametrize("name", TEXTS)
def test_numbers_of_documents_are_those_of_the_raw_files(name):
    assert figures.complaints(TEXTS[name]) == []


def test_every_figure_is_shown_once():
    shown = [block[1] for text in TEXTS.values() for block in figures.BLOCK.finditer(text)]
    assert sorted(shown) == sorted(figures.FIGURES)


@pytest.mark.parametrize(
    "name, source, n_derived",  # how many numbers of a block may stand in no raw file
    [
        ("demo", "demo_cpu", 3),  # the formula's, one token per round, all rows
        ("peers", "peers_cpu", 3),  # 16 and 32 bits, and a comma in a length
        ("auto", "auto_cpu", 5),  # medians of errors, and the largest
        ("quarters", "strategies_quarters_cpu", 0),
        ("schedule", "checkpoints/demo/training.json", 0),
    ],
)
def test_tables_have_the_values_of_their_raw_files(name, source, n_derived):
    """Found without their functions: each number is one of the file's, rounded in some way."""
    values, todo = set(), [json.loads(figures.newest(source).read_text())]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float):
            values |= {f"{x:,.{n}f}" for x in (value, value / 1e6) for n in range(3)}
            values |= {str(value), f"{value:.0%}", f"{value:.1%}"}
        else:
            values |= set(NUMBER.findall(str(value)))
    block = figures.body(name).split("\nFrom `")[0]
    numbers = {*NUMBER.findall(block.replace("*", ""))}
    assert len(numbers) > 9 and len(numbers - values) <= n_derived, numbers - values


def test_a_block_that_is_not_what_the_raw_files_give_is_found():
    block = "a\n<!-- figures: x -->\n{}<!-- end -->\n<!-- figures: y -->\ny 2.0 s\n<!-- end -->\n"
    text, fresh = block.format("x 1.0 s\n"), {"x": "x 1.5 s\n", "y": "y 2.0 s\n"}.__getitem__
    assert figures.complaints(text, fresh) == ["block x is not what its raw files give"]
    new = figures.rewritten(text, fresh)
    assert new == block.format("x 1.5 s\n") and figures.complaints(new, fresh) == []
    with pytest.raises(ValueError, match="no <!-- end --> before the next one"):
        figures.rewritten(text.replace("<!-- end -->\n", "", 1), fresh)
    with pytest.raises(ValueError, match="block 'z' is unknown; known: .*, demo, "):
        figures.rewritten(text.replace("figures: x", "figures: z"))


def test_the_command_writes_documents_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "DOCUMENTS", ("a.md",))
    stale = "<!-- figures: step_bytes -->\nold\n<!-- end -->\n"
    (tmp_path / "a.md").write_text(stale)
    assert figures.main(["--check"]) == 1 and (tmp_path / "a.md").read_text() == stale
    assert capsys.readouterr().out == "a.md: block step_bytes is not what its raw files give\n"
    assert figures.main([]) == 0 and capsys.readouterr().out == "wrote a.md\n"
    assert "K and V" in (tmp_path / "a.md").read_text() and figures.main(["--check"]) == 0
    (tmp_path / "a.md").write_text("in 3 seconds")
    assert figures.main(["--check"]) == 1 and "'3 seconds' in " in capsys.readouterr().out


def test_the_newest_raw_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for day in ("a_cpu_2026-11-09", "a_cpu_2026-11-22", "a_cpu_2026-11-30_x", "a_cpu_x_2027-01-01"):
        (tmp_path / f"{day}.json").write_text("{}")
    assert figures.newest("a_cpu").name == "a_cpu_2026-11-22.json"
    with pytest.raises(FileNotFoundError, match="has no b_cpu_YYYY-MM-DD.json"):
        figures.newest("b_cpu")
    with pytest.raises(FileNotFoundError, match="has no floor_cpu_YYYY"):
        figures.body("floor")


@pytest.mark.parametrize("text, found", [
    ("a step takes 58.2 ms", ["58.2 ms"]),
    ("`T_T` reads 26 GB/s", ["26 GB"]),
    ("1,375 MB, or 2.5x, at 40% and 40 %", ["1,375 MB", "2.5x", "40%", "40 %"]),
    ("accepts 0.71 of them", ["0.71"]),
    ("in 71\nrounds", ["71 rounds"]),
    ("16 of 16 outputs", ["16 of 16"]),
    ("```text\nspeedup 2.42\n```", ["2.42"]),
    ("a loss of 2.3 nats, twice", ["2.3 nats"]),
    ("<!-- figures: x -->\n3 s\n<!-- end -->\n4 s", ["4 s"]),
    ("16 rows of 3,000 tokens, gamma 5, 4k", []),
    ("Qwen2.5, v0.2 and 2-0.5; arXiv 2408.11049, https://a.b/2408.11049 3", []),
    ("`--temperature 0.8`; 3 seasons; Llama 3, 3.1, 3.2 and transformers 5.23", []),
    ("```bash\nsleep 0.8\n```\n```python\nx = 0.8\n```", []),
])  # fmt: skip
def test_what_looks_measured(text, found):
    assert [complaint.split("'")[1] for complaint in figures.measured_numbers(text)] == found


def test_exceptions_are_needed():
    for phrase in figures.ALLOWED:
        assert any(phrase in text for text in TEXTS.values()), f"{phrase!r} is in no document"


def test_several_ways_to_draft_have_a_line_each():
    """`generate.py --json` with a list of runs, and its older form with one draft."""
    plain = {"name": "plain", "decode_tokens_per_second": 100.0, "target_step_ms": 50.0,
             "temperature": 0.0}  # fmt: skip
    streaming = plain | {
        "name": "streaming 128", "decode_tokens_per_second": 170.4, "speedup": 1.704,
        "row_speedup": 2.4, "draft_acceptance_rate": 0.71, "mean_acceptance_length": 4.0,
        "draft_step_ms": 7.0, "verify_ms": 65.0, "formula": 2.0, "gamma": 5,
        "identical_rows": 15,
    }  # fmt: skip
    warm = streaming | {"name": "auto", "temperature": 0.8}
    raw = {"runs": [plain, streaming, warm | {"temperature": 0.0}, warm], "outputs": [0] * 16}
    head, _, first, second, third, last = blocks.demo(raw).splitlines()
    assert last.startswith("| auto, temperature 0.8 | 170 |")
    assert first.startswith("| plain | 100 | ") and third.startswith("| auto | 170 |")
    assert second == ("| streaming 128 | 170 | 0.71 | 4.00 | 7.0 | 65.0 | 2.00 | 2.40 | **1.70** | "
                      "15 of 16 |")  # fmt: skip
    pair = {"baseline": plain, "speculative": streaming, "plan": {"strategy": "x", "gamma": 5},
            "speedup": 1.704, "row_speedup": 2.4, "outputs": [0] * 16,
            "differences": [0]}  # fmt: skip
    assert blocks.demo(pair).splitlines()[3] == second.replace("streaming 128", "x")


def test_the_picture_is_told_in_words():
    def cell(B: int, S: int, row: float) -> dict:
        streaming = {"row_speedup": row, "batch_speedup": row - 0.25}
        ways = {"streaming": streaming, "auto": streaming | {"predicted_speedup": 1.5}}
        return {"batch_size": B, "length": S, "ways": ways, "predicted": {"speedup": 3.0},
                "outputs": 16, "identical": 15}  # fmt: skip

    cells = [cell(1, 512, 0.9), cell(16, 512, 1.2), cell(1, 4096, 1.3), cell(16, 4096, 2.4)]
    raw = {"date": "2026-11-30", "environment": {"device": "cpu"}, "cells": cells}
    picture, _, *words = blocks.scaling_picture(raw).splitlines()
    assert picture.endswith("(benchmarks/results/scaling_cpu_2026-11-30.streaming.svg)")
    assert " ".join(words).endswith("4,096 tokens that is 1.30 at batch size 1 and 2.40 at 16.")
    text = blocks.scaling(raw)
    assert "| streaming, B | 512 tokens | 4,096 tokens |" in text and "60 of 64 outputs" in text
    assert "| 16 | 1.20 / 0.95 (3.00) | 2.40 / 2.15 (3.00) |" in text
    assert "| 16 | 1.20 / 0.95 (1.50) | 2.40 / 2.15 (1.50) |" in text


def test_texts_that_end_in_a_run():
    assert blocks.repeats_itself("a\nx\nx\n\n  \nx\nx\nx, unfi", [*range(99)])
    assert not blocks.repeats_itself("a\nx\nx\nx\nunfi", [*range(99)])
    assert blocks.repeats_itself("a", [1] + [2] * 64)
    assert not blocks.repeats_itself("a", [2] * 63)


def test_one_round_tells_what_is_decided():
    """The drafts that stay, and then the model's own token, are what it writes by itself."""
    model = tiny_model()
    engine = Engine(model, 4, 180, Strategy("streaming", 2, 40, 3), Sampling())
    engine.prefill(PROMPTS, [100] * 4)
    found = one_round.find_round(engine, NumberTokenizer(97))
    assert found["round"] >= one_round.FIRST and one_round.telling(found["rows"])
    for row, prompt in zip(found["rows"], PROMPTS, strict=True):
        start, n = row["decided"] - len(prompt), row["new"]
        assert row["kept"] == n - 1 and row["drafted"][: n - 1] == row["model_says"][:-1]
        written = plain_greedy(model, prompt, 100)[start : start + n]
        assert row["model_says"] == [f" {i}" for i in written]


def bash_commands() -> list[str]:
    """Those in blocks of code and in backticks, one by one, with their comments."""
    found = []
    for text in TEXTS.values():
        shells = [code for kind, code in figures.FENCE.findall(text) if kind == "bash"]
        rest = figures.FENCE.sub("", text)
        shells += [code for code in re.findall("`([^`]+)`", rest)
                   if re.match("(python|pytest|ruff|pip) ", code)]  # fmt: skip
        lines = "\n".join(shells).replace("\\\n", " ").replace(" && ", "\n").splitlines()
        found += [" ".join(line.split()) for line in lines]
    return sorted({*filter(None, found)})


@pytest.mark.parametrize("command", bash_commands())
def test_commands_of_documents_run(command, tmp_path):
    """Cheap ones do; of others the flags are read; what is installed or tested is what CI does."""
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":
        words = words[words.index("generate.py") :]
        assert any(mark in command for mark in MARKED)
    script, *flags = words or [""]
    if script == "generate.py":
        options.parse_args([*flags] + ["FILE"] * (flags[-1:] == ["--json"]))
    elif script in ("cost_model.py", "benchmarks/paper.py"):
        assert {"cost_model.py": cost_model, "benchmarks/paper.py": paper}[script].main(flags) == 0
    elif program == "python":
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(flag in source for flag in flags if flag.startswith("--"))
        tested = (ROOT / "tests" / "test_benchmarks.py").read_text() + "figures, one_round: here"
        assert re.search(rf"\b{Path(script).stem}\b", tested) or any(m in command for m in MARKED)
    elif program == "echo":
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert len(read_jsonl(tmp_path / "prompts.jsonl")) == 1
    elif program in ("pip", "pytest", "ruff", "mypy"):
        done = (ROOT / ".ci" / "run").read_text().replace(" -q", "")
        for word in (word for word in words if word.endswith((".py", ".txt"))):
            assert (ROOT / word).exists()
        tools = words[1:] if program == "pip" else [program]
        assert all(tool in done for tool in tools)
    else:
        assert program == "export"
    if any(word.startswith("~") or "random:" in word for word in words):
        assert any(mark in command for mark in MARKED)


def test_the_file_of_prompts_of_the_readme_is_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    echo, serve = (c for c in bash_commands() if "prompts.jsonl" in c)
    subprocess.run(echo, shell=True, check=True)
    assert generate.main([*shlex.split(serve)[2:], "--no-compile", "--draft", "ngram"]) == 0
    manifest, answer = map(json.loads, Path("answers.jsonl").read_text().splitlines())
    assert manifest["manifest"] and len(answer["token_ids"]) == 64


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name])
    missing = {link for link in links if not (ROOT / name).parent.joinpath(link).exists()}
    assert missing <= AWAITED and (links or name == "benchmarks/README.md")


def test_the_tour_names_every_file():
    tour = README.split("**The tour.**")[1].split("\n## ")[0]
    assert sorted(re.findall(r"\b\w+\.py\b", tour.replace("tests/reference.py", ""))) == sorted(
        path.name for path in ROOT.glob("*.py")
    )


def test_the_readme_is_short_and_has_few_numbers():
    assert len(README.splitlines()) <= 260
    text = figures.NOT_TEXT.sub("", figures.FENCE.sub("", README))
    text = re.sub(r"^([|]|From `).*$|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    assert len(NUMBER.findall(text)) <= 0.03 * len(text.split())
