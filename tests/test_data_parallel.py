"""Several processes answer one file of prompts: all of it, each line once, whoever dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import generate
from data_parallel import SharedOutput, supervise
from offline import Input, Line
from options import parse_args
from results import open_output
from tests.test_parallel import ENVIRONMENT, ROOT, torchrun

FLAGS = ("--no-compile", "--draft", "streaming", "--gamma", "2", "--batch_size", "2")


@pytest.fixture
def given(tmp_path) -> Input:
    path = tmp_path / "in.jsonl"
    path.touch()
    return Input(path, [Line(n, f"r{n}", SimpleNamespace()) for n in range(1, 6)], [], "")


def in_a_child(work) -> None:
    """What a process does that is then killed."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_claims_die_with_their_process(tmp_path, given):
    path = tmp_path / "out.jsonl"
    with open_output(path, given, {"x": 1}, SharedOutput) as output:
        ours = output.claims(given.lines)
        assert next(ours).id == "r1"

        def other() -> None:
            with open_output(path, given, {"x": 1}, SharedOutput) as output:
                theirs = output.claims(given.lines)
                claimed = [next(theirs).id, next(theirs).id]
                output.append({"id": claimed[1]})
                os.write(output.fd, json.dumps(claimed).encode())  # in the midst of a line
                os._exit(0)

        in_a_child(other)
        assert path.read_bytes().endswith(b'{"id": "r3"}\n["r2", "r3"]')
        assert [line.id for line in ours] == ["r2", "r4", "r5"]
        assert output.missing(given.lines) and output.done == {"r3"}
        for n in (1, 2, 4, 5):
            output.append({"id": f"r{n}"})
        assert not output.missing(given.lines)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"manifest": {"x": 1}}
    assert [line["id"] for line in lines[1:]] == ["r3", "r1", "r2", "r4", "r5"]


def test_others_wait_for_a_living_process(tmp_path, given):
    path, found = tmp_path / "out.jsonl", tmp_path / "found"
    with open_output(path, given, {}, SharedOutput) as output:
        assert next(output.claims(given.lines)).id == "r1"
        claims = output.claims(given.lines)  # another pass does not give it again
        assert next(claims).id == "r2"

        def other() -> None:
            with open_output(path, given, {}, SharedOutput) as output:
                ids = [line.id for line in output.claims(given.lines)]
                found.write_text(json.dumps([ids, output.missing(given.lines)]))
                os._exit(0)

        in_a_child(other)
        assert json.loads(found.read_text()) == [["r3", "r4", "r5"], True]
        with pytest.raises(OSError, match="being written by another process"), \
             open_output(path, given, {}):  # fmt: skip
            pass
    with open_output(path, given, {}), \
         pytest.raises(OSError, match="being written"), \
         open_output(path, given, {}, SharedOutput):  # fmt: skip
        pass


def test_what_does_not_go_together_is_refused():
    compared = ("--prompts", "a", "--output", "b", "--compare")
    for flags, why in {(): "needs --output", compared: "has no --compare"}.items():
        with pytest.raises(ValueError, match=f"--data_parallel {why}"):
            parse_args(["--data_parallel", *flags])


def test_who_supervises_is_content_unless_all_fail(monkeypatch, capsys):
    """The process that works can be interrupted, which the one that waits survives."""
    handler, n_failed = signal.getsignal(signal.SIGINT), [0]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def add(name: str, n: int) -> int:
        n_failed[0] += n
        return n_failed[0]

    def run(code: str) -> int:
        code = f"import os, signal, sys; {code}"
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", code])
        return supervise(SimpleNamespace(add=add))

    try:
        hears = "signal.getsignal(2) is signal.default_int_handler"
        assert run(f"sys.exit(0 if {hears} and 'GENERATE_DATA_PARALLEL' in os.environ else 5)") == 0
        assert n_failed == [0] and capsys.readouterr().err == ""
        assert run("os.kill(os.getpid(), 9)") == 0 and n_failed == [1]
        assert run("sys.exit(3)") == 3
    finally:
        signal.signal(signal.SIGINT, handler)


def outputs(path: Path) -> list[tuple[str, list[int]]]:
    """Ids and tokens, in order."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((r["id"], r["token_ids"]) for r in records if "id" in r)


def test_a_killed_process_loses_only_what_was_in_flight(tmp_path, capsys):
    """Under torchrun. One process alone gives the same answers, and has none of the flags."""
    prompts, alone = tmp_path / "in.jsonl", tmp_path / "alone.jsonl"
    requests = [
        {"id": f"r{n}", "prompt": f"def f{n}(x):", "max_new_tokens": 30 + 20 * (n % 3)}
        for n in range(9)
    ]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in requests))
    shared, note = tmp_path / "shared.jsonl", tmp_path / "killed"
    command = torchrun(ROOT / "tests" / "ends.py", "kill", note, "--data_parallel", *FLAGS,
                       "--prompts", prompts, "--output", shared)  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and note.exists(), done.stderr
    assert "generate.py: process 1 was ended by signal 9; the others take its" in done.stderr
    assert generate.main([*FLAGS, "--prompts", str(prompts), "--output", str(alone)]) == 0
    assert outputs(shared) == outputs(alone) and len(outputs(shared)) == 9
