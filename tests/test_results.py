"""The file of results: what a kill leaves, what a full disk leaves, and who may write."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batch import Request
from checkpoint import DEMO_CHECKPOINT
from offline import BadLine, Input, Line
from results import fingerprint, open_output

ROOT = Path(__file__).parent.parent
MANIFEST = {"version": 1, "input_sha256": "1f", "sampling": {"temperature": 0.0, "top_k": None}}
IDS = ["a", "b", "é\u2028\n"]


def asked(path: Path, bad=()) -> Input:
    """Three requests; the file of prompts itself is not read any more."""
    file = path.with_name("in.jsonl")
    file.touch()
    lines = [Line(n, name, Request([1], 1)) for n, name in enumerate(IDS, start=1)]
    return Input(file, lines, list(bad), "1f")


def result(name: str) -> dict:
    return {"id": name, "line": IDS.index(name) + 1, "text": f"{name}\n\x00漢", "token_ids": [1, 2]}


def finish(path: Path, manifest=MANIFEST, bad=(), stop_after=9) -> set[str]:
    """Run until all is done; the ids that were done before."""
    with open_output(path, asked(path, bad), manifest) as output:
        before = set(output.done)
        for name in [name for name in IDS if name not in before][:stop_after]:
            output.append(result(name))
    return before


def test_a_line_for_the_manifest_and_one_for_every_result(tmp_path):
    path = tmp_path / "out.jsonl"
    assert finish(path) == set()
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {"manifest": MANIFEST} and lines[-1] == b""
    assert [json.loads(line) for line in lines[1:-1]] == [result(name) for name in IDS]
    whole = path.read_bytes()
    assert finish(path) == set(IDS) and path.read_bytes() == whole


def test_cut_at_every_byte_the_file_becomes_whole_again(tmp_path):
    path = tmp_path / "out.jsonl"
    finish(path)
    whole = path.read_bytes()
    starts = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        done = sum(start <= n for start in starts) - 1
        assert finish(path) == set(IDS[: max(done, 0)]), n
        assert path.read_bytes() == whole, n


def test_what_a_process_could_not_write_in_full_is_taken_away_at_once(tmp_path):
    """A limit on the size of files is a disk that gets full: a write is short, the next fails."""
    path = tmp_path / "out.jsonl"
    finish(path)
    whole = path.read_bytes()
    ends = [0] + [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n in range(len(whole)):
        path.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
        try:
            with pytest.raises(
                OSError, match="cannot write .*: File too large; [0-3] requests are done, and"
            ):
                finish(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == whole[: max(end for end in ends if end <= n)], n
        finish(path)
        assert path.read_bytes() == whole, n


def test_an_interruption_between_two_halves_of_a_line_leaves_none(tmp_path, monkeypatch):
    path, write = tmp_path / "out.jsonl", os.write

    def interrupted(fd: int, data: bytes) -> int:
        if len(data) < 40:
            raise KeyboardInterrupt
        return write(fd, data[:30])

    with open_output(path, asked(path), MANIFEST) as output:
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            output.append(result("a"))
        assert path.read_bytes() == before
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:30]))
        output.append(result("a"))
    assert json.loads(path.read_bytes().removeprefix(before)) == result("a")


def test_bad_lines_are_recorded_once(tmp_path):
    path, bad = tmp_path / "out.jsonl", [BadLine(4, None, "not JSON"), BadLine(5, "a", "twice")]
    finish(path, bad=bad, stop_after=1)
    whole = path.read_bytes()
    assert b'{"line": 4, "error": "not JSON"}\n{"line": 5, "id": "a", "error": "twice"}\n' in whole
    path.write_bytes(whole[: whole.index(b'{"line": 5') + 9])  # killed while it wrote the second
    assert finish(path, bad=bad) == set()  # an error's id is not done
    assert finish(path, bad=bad) == set(IDS)
    assert path.read_bytes().count(b"error") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "with version 1, now it is 2"),
        ({"sampling": {"temperature": 0.5, "top_k": None}},
         r"sampling.temperature 0\.0, now it is 0\.5"),
        ({"sampling": {"temperature": 0.0, "top_k": 5}}, "sampling.top_k None, now it is 5"),
        ({"draft": "snapkv"}, "with draft None, now it is snapkv"),
        ({"input_sha256": "2e"}, "input_sha256 1f, now it is 2e"),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_what_differs(tmp_path, changes, words):
    path = tmp_path / "out.jsonl"
    finish(path, stop_after=1)
    path.write_bytes(path.read_bytes() + b"{")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"out.jsonl was begun {words}|{words}; continue it as it"):
        finish(path, MANIFEST | changes)
    assert path.read_bytes() == before  # not even repaired
    finish(path, MANIFEST | {"checkpoint": "moved", "input": "renamed"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notes", "exists and is no file of results"),
        ("notes\n", "exists and is no file of results"),
        ("{}\n", "exists and is no file of results"),
        ('{"manifest": 5}\n', "exists and is no file of results"),
        ("\n\n", "exists and is no file of results"),
        ("\x00\xff\n", "exists and is no file of results"),
        ('{"manifest": {}', "exists and is no file of results"),
        ('%s\n{"id": "x"}\n', r"line 2: no result of a request of the input"),
        ('%s\n{"id": "a"}\n{"id": ["a"]}\n', r"line 3: no result"),
        ('%s\n{"id": "a"}\nnotes\n', r"line 3: no result"),
        ('%s\n{"id": "a"}\n5\n{"id": "b"}', r"line 3: no result"),
        ('%s\n{"error": "b"}\n', r"line 2: no result"),
        ('%s\n{"error": "b", "line": [1]}\n', r"line 2: no result"),
    ],
)
def test_a_file_of_somebody_else_is_refused_as_it_is(tmp_path, text, words):
    path = tmp_path / "out.jsonl"
    before = text.replace("%s", json.dumps({"manifest": MANIFEST})).encode("latin-1")
    path.write_bytes(before)
    with pytest.raises(ValueError, match=words):
        finish(path)
    assert path.read_bytes() == before


def test_the_input_is_never_written_to(tmp_path):
    """By its own name, a link, a hard link, another way to the directory."""
    given = asked(tmp_path / "out.jsonl")
    given.path.write_text('{"prompt": "a"}\n')
    (tmp_path / "link").symlink_to(given.path)
    (tmp_path / "hard").hardlink_to(given.path)
    (tmp_path / "sub").mkdir()
    for name in ("in.jsonl", "link", "hard", "sub/../in.jsonl"):
        with (
            pytest.raises(ValueError, match="is the file of prompts"),
            open_output(tmp_path / name, given, MANIFEST),
        ):
            pass
    assert given.path.read_text() == '{"prompt": "a"}\n'


def test_places_where_no_file_can_be(tmp_path):
    given = asked(tmp_path / "out.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for path, error, words in [
        (tmp_path, ValueError, "no ordinary file"),
        (Path("/dev/full"), ValueError, "no ordinary file"),
        (Path("/dev/null"), ValueError, "no ordinary file"),
        (tmp_path / "pipe", ValueError, "no ordinary file"),
        (tmp_path / "nowhere" / "out.jsonl", OSError, "cannot write .*: No such file"),
        (Path("/proc/out.jsonl"), OSError, "cannot write /proc/out.jsonl: No such file"),
        (tmp_path / "in.jsonl" / "out.jsonl", OSError, "Not a directory"),
        (tmp_path / ("x" * 300), OSError, "File name too long"),
    ]:
        with pytest.raises(error, match=words), open_output(path, given, MANIFEST):
            pass


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_file_that_loses_its_name_ends_the_run(tmp_path, how):
    """And where it was moved to, it has all results, and can be continued."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    path = folder / "out.jsonl"
    with (
        pytest.raises(
            OSError, match="out.jsonl was moved, deleted or replaced; 2 requests are done"
        ),
        open_output(path, asked(path), MANIFEST) as output,
    ):
        output.append(result("a"))
        folder.rename(other)
        if how == "deleted":
            (other / "out.jsonl").unlink()
        if how == "replaced":
            folder.mkdir()
            path.touch()
        output.append(result("b"))
    if how != "deleted":
        assert finish(other / "out.jsonl") == {"a", "b"}
    folder.mkdir(exist_ok=True)
    assert finish(path) == set()


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_results import *
path = Path(sys.argv[1])
with open_output(path, asked(path), MANIFEST) as output:
    print("open", flush=True)
    for name in IDS:
        if name not in output.done:
            time.sleep(0.2)
            output.append(result(name) | {"text": "x" * 10**7})
            print(name, flush=True)
"""


def test_a_second_process_is_refused_and_a_killed_one_is_not_missed(tmp_path):
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", WRITER, str(path), str(ROOT), str(ROOT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "open\n"
        with pytest.raises(OSError, match="out.jsonl is being written by another process"):
            finish(path)
        assert first.stdout.readline() == "a\n"
        time.sleep(0.205)  # about where the second line is written
        first.send_signal(signal.SIGKILL)
    done = finish(path)
    assert "a" in done and finish(path) == set(IDS)
    assert len(path.read_bytes().split(b"\n")) == 5


def test_a_checkpoint_is_told_from_another_one(tmp_path):
    """By its files' sizes, and by their beginnings and ends."""
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((DEMO_CHECKPOINT / name).read_bytes())
    weights, sums = tmp_path / "model.safetensors", set()
    for data in (b"a" * 2**22, b"a" * 2**22 + b"b", b"a" * (2**22 - 1) + b"b",
                 b"b" + b"a" * (2**22 - 1)):  # fmt: skip
        weights.write_bytes(data)
        sums.add(fingerprint(tmp_path))
        assert fingerprint(tmp_path) in sums
    (tmp_path / "chat_template.jinja").write_text("x")
    sums.add(fingerprint(tmp_path))
    sums |= {fingerprint(Path(f"random:{name}")) for name in ("llama-2-7b", "llama-3.1-8b")}
    assert len(sums) == 7
