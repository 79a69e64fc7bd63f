"""Files of prompts from the command line: every answer is there once, whatever comes in between."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import load
import serve
from batch import Request
from chat import load_chat
from checkpoint import load_model
from generate import main
from offline import Input
from refill import Result
from results import Output, open_output
from sampling import Stats, row_seed
from serve import Ticker
from spec_decode import Engine
from tests.reference import plain_greedy
from tests.test_generate import FIXED, PLAIN, one_line, too_kind
from tokenizer import continuation, load_tokenizer

ROOT = Path(serve.__file__).parent
WORDS = ["class", "def", "return", "self", "value", "name", "list", "None", "True", "print"]
ASKED = [
    {"id": "a", "prompt": "import os\n" * 9},
    {"prompt": "class A:", "max_new_tokens": 3},
    {"custom_id": "c", "body": {"prompt": "def f(", "max_tokens": 17}},
    {"prompt": "x", "max_new_tokens": 1},
    {"prompt": "for i in range(", "max_new_tokens": 29},
]


def ask(folder: Path, lines: list = ASKED) -> Path:
    file = folder / "in.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def flags(checkpoint: Path, *more: str) -> list[str]:
    given = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "12"]
    given += ["--prompts", str(checkpoint / "in.jsonl"), "--output", str(checkpoint / "out.jsonl")]
    return [*given, "--draft_budget", "20", *more]


def records(checkpoint: Path) -> list[dict]:
    first, *lines = (checkpoint / "out.jsonl").read_text().splitlines()
    assert json.loads(first).keys() == {"manifest"}
    return [json.loads(line) for line in lines]


def answers(checkpoint: Path) -> dict[str, list[int]]:
    """Tokens by id, each of which is there once."""
    found = records(checkpoint)
    by_id = {record["id"]: record["token_ids"] for record in found}
    assert len(by_id) == len(found)
    return by_id


def alone(checkpoint: Path, prompt: str, n: int) -> list[int]:
    """What plain greedy decoding makes of a prompt, up to the end token."""
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    ids = plain_greedy(model, load_tokenizer(checkpoint).encode(prompt), n)
    return ids[: ids.index(2) + 1] if 2 in ids else ids


@pytest.mark.parametrize("draft", [PLAIN, FIXED, [], ["--draft", "snapkv", "--obs_window", "6"]])
def test_every_answer_is_that_of_the_request_alone(checkpoint, draft, capsys):
    ask(checkpoint)
    numbers = checkpoint / "numbers.json"
    more = [*draft, "--batch_size", "2", "--json", str(numbers)]
    more += [] if draft == PLAIN else ["--check_lossless"]
    assert main(flags(checkpoint, *more)) == 0
    tokenizer, found = load_tokenizer(checkpoint), records(checkpoint)
    expected = {"a": ("import os\n" * 9, 12), "2": ("class A:", 3), "c": ("def f(", 17),
                "4": ("x", 1), "5": ("for i in range(", 29)}  # fmt: skip
    assert sorted(r["line"] for r in found) == [1, 2, 3, 4, 5] and len(found) == 5
    for record in found:
        prompt, n = expected[record["id"]]
        ids, new = tokenizer.encode(prompt), record["token_ids"]
        assert new == alone(checkpoint, prompt, n)
        assert record["finish_reason"] == ("eos" if new[-1] == 2 else "length")
        assert record["text"] == continuation(tokenizer, ids, new[:-1] if new[-1] == 2 else new)
        assert record["prompt_tokens"] == len(ids)
        assert record["decode_seconds"] >= 0 and record["first_token_seconds"] > 0
        if draft == FIXED and len(new) > 1:
            assert 1 <= record["mean_acceptance_length"] <= 6
    out, result = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "5 prompts of 2 to 28 tokens through 2 rows, up to 29 new ones each, greedy" in out
    assert "rows busy" in out and "ms per token" in out and "longest gap" in out
    assert (result["requests"], result["bad_lines"], result["done_before"]) == (5, 0, 0)
    if draft != PLAIN:
        assert result["identical"] and "5 of 5 outputs identical" in out
        assert "over plain decoding" in out and result["speedup"] > 0
        assert result["speculative"]["generated_tokens"] == sum(len(r["token_ids"]) for r in found)
        assert result["baseline"]["decoded_tokens"] == result["speculative"]["decoded_tokens"]
    assert ("auto: " in out) == ("--gamma" not in draft and draft != PLAIN)


def test_sampled_answers_depend_on_the_request_alone(checkpoint):
    """Not on rows, order or strategy; each line samples in its own way."""
    asked = [{"prompt": f"{word} =", "temperature": 0.5 + n / 4} for n, word in enumerate(WORDS)]
    ask(checkpoint, [*asked, {"prompt": "x", "temperature": 0}, {"prompt": "x", "top_k": 9},
                     {"prompt": "x", "top_k": 9}, {"prompt": "x", "top_k": 9, "seed": 5},
                     {"prompt": "x", "top_k": 9, "seed": 5}])  # fmt: skip
    sampled = ["--temperature", "1", "--top_p", "0.9"]
    found = []
    for more in (["--batch_size", "1", *PLAIN], ["--batch_size", "5", *FIXED],
                 ["--order", "longest", *FIXED],
                 ["--batch_size", "3", "--max_gap", "0.001"]):  # fmt: skip
        assert main(flags(checkpoint, *sampled, *more)) == 0
        found.append(answers(checkpoint))
        (checkpoint / "out.jsonl").unlink()
    assert found[0] == found[1] == found[2] == found[3]
    n, one = len(WORDS), found[0]
    assert one[str(n + 1)] == alone(checkpoint, "x", 12)
    assert one[str(n + 2)] != one[str(n + 3)] and one[str(n + 4)] == one[str(n + 5)]
    main(flags(checkpoint, *sampled, *PLAIN, "--seed", "2"))
    assert answers(checkpoint)["1"] != one["1"]
    assert row_seed(1, 2) != row_seed(2, 2)


def test_stop_texts_end_answers(checkpoint):
    ask(checkpoint, [{"prompt": "import os", "max_new_tokens": 40}])
    main(flags(checkpoint, "--ignore_eos", *FIXED))
    (free,) = records(checkpoint)
    end = free["text"].index(free["text"][9:12])
    stop = free["text"][9:12]
    (checkpoint / "out.jsonl").unlink()
    ask(checkpoint, [{"prompt": "import os", "max_new_tokens": 40, "stop": ["\x00", stop]}])
    main(flags(checkpoint, "--ignore_eos", *FIXED))
    (stopped,) = records(checkpoint)
    assert stopped["finish_reason"] == "stop" and stopped["text"] == free["text"][:end]
    n = len(stopped["token_ids"])
    assert stopped["token_ids"] == free["token_ids"][:n] and n < 40


def test_longest_first_and_first_come(checkpoint):
    ask(checkpoint)
    for order, ids in (
        ("first", ["a", "2", "c", "4", "5"]),
        ("longest", ["a", "5", "c", "2", "4"]),
    ):
        main(flags(checkpoint, "--order", order, "--batch_size", "1", *PLAIN))
        assert [record["id"] for record in records(checkpoint)] == ids
        (checkpoint / "out.jsonl").unlink()


def test_the_same_command_goes_on_and_another_one_does_not(checkpoint, monkeypatch, capsys):
    ask(checkpoint)
    assert main(flags(checkpoint, *FIXED)) == 0
    out, whole = checkpoint / "out.jsonl", answers(checkpoint)
    out.write_bytes(out.read_bytes()[:-300])
    kept = out.read_bytes()
    capsys.readouterr()
    for other, word in [
        (["--temperature", "1"], "sampling.temperature 0.0, now it is 1.0"),
        (["--max_new_tokens", "13"], "max_new_tokens 12, now it is 13"),
        (["--gamma", "3"], "strategy.speculate_k 5, now it is 3"),
        (["--seed", "3"], "seed 1234, now it is 3"),
        (["--dtype", "bfloat16"], "dtype float32, now it is bfloat16"),
    ]:
        assert main(flags(checkpoint, *FIXED, *other)) == 2
        assert word in one_line(capsys) and out.read_bytes() == kept
    assert main(flags(checkpoint, *FIXED, "--batch_size", "1", "--order", "longest")) == 0
    assert answers(checkpoint) == whole
    assert "of 5 requests are done already" in capsys.readouterr().out
    monkeypatch.setattr(load, "load_weights", lambda *args: pytest.fail("nothing is left to do"))
    assert main(flags(checkpoint, *FIXED, "--json", str(checkpoint / "x.json"))) == 0
    assert json.loads((checkpoint / "x.json").read_text())["done_before"] == 5
    ask(checkpoint, ASKED[:4])
    assert main(flags(checkpoint, *FIXED)) == 2
    assert "was begun with input_sha256" in one_line(capsys)


KILLS = """
import os, random, signal, sys, time
import torch
from generate import main
torch.set_num_threads(1)
flags, rng, killed, size = sys.argv[2:], random.Random(int(sys.argv[1])), 0, 0
def child(argv):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(argv))
    return pid
out = flags[flags.index("--output") + 1]
began = time.time()
assert os.waitpid(child(flags[:-1] + [out + ".whole"]), 0)[1] == 0
whole = time.time() - began
for n in range(10):
    pid = child(flags)
    while n % 2 and not (os.path.exists(out) and os.path.getsize(out) > size):
        time.sleep(0.001)  # every second time, not before something new is there
    time.sleep(rng.uniform(0, whole / 12))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    size = os.path.getsize(out) if os.path.exists(out) else 0
assert killed == 10, killed
sys.exit(os.waitpid(child(flags), 0)[1])
"""


def test_ten_kills_and_reruns_leave_the_file_of_an_undisturbed_run(checkpoint):
    asked = [{"id": word + str(n), "prompt": f"{word} = {word}", "max_new_tokens": 5 + n * 7 % 30,
              "temperature": n % 3 / 2} for n in range(4) for word in WORDS]  # fmt: skip
    ask(checkpoint, asked)
    more = flags(checkpoint, *FIXED, "--batch_size", "3")
    out = checkpoint / "out.jsonl"
    more = [f for f in more if f not in ("--output", str(out))] + ["--output", str(out)]
    command = [sys.executable, "-c", KILLS, "7", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = answers(checkpoint)
    out.unlink()
    out.with_name("out.jsonl.whole").rename(out)
    assert found == answers(checkpoint) and len(found) == len(asked)


def test_answers_that_differ_from_plain_decoding_are_named(checkpoint, monkeypatch, capsys):
    ask(checkpoint)
    monkeypatch.setattr(Engine, "accept", too_kind)
    numbers = checkpoint / "numbers.json"
    assert main(flags(checkpoint, *FIXED, "--check_lossless", "--json", str(numbers))) == 1
    result, out = json.loads(numbers.read_text()), capsys.readouterr().out
    named, n = result["differing_ids"], len(result["differing_ids"])
    assert not result["identical"] and "a" in named and "4" not in named
    assert (
        f"{5 - n} of 5 outputs identical" in out
        and "not: " in out
        and len(answers(checkpoint)) == 5
    )


def test_conversations_are_put_into_the_chat_format(chat_checkpoint):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"}]  # fmt: skip
    ask(chat_checkpoint, [{"messages": said}, {"prompt": "Hi"}])
    more = flags(chat_checkpoint, *FIXED, "--chat", "--system", "Be brief.")
    assert main(more) == 0
    tokenizer = load_tokenizer(chat_checkpoint)
    chat, end = load_chat(chat_checkpoint, tokenizer), tokenizer.special("<|im_end|>")
    model = load_model(chat_checkpoint, torch.device("cpu"), torch.float32)
    found = answers(chat_checkpoint)
    for name, prompt in (("1", chat.start("Why?", "Be brief.", ["Hi", "Hello"])),
                         ("2", chat.start("Hi", "Be brief."))):  # fmt: skip
        ids = plain_greedy(model, prompt, 12)
        assert found[name] == ids[: ids.index(end) + 1 if end in ids else 12]
    assert main([f for f in more if f != "--chat"][:-2]) == 2  # and no --system


def test_a_second_process_is_refused_in_one_line(checkpoint, capsys):
    given = Input(ask(checkpoint), [], [], "")
    with open_output(checkpoint / "out.jsonl", given, {}):
        assert main(flags(checkpoint, *PLAIN)) == 2
    assert "out.jsonl is being written by another process" in one_line(capsys)


def test_an_interruption_says_how_far_it_came(checkpoint, monkeypatch, capsys):
    append = Output.append

    def interrupt(self: Output, record: dict) -> None:
        append(self, record)
        if len(self.done) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    ask(checkpoint)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with monkeypatch.context() as patched:
        patched.setattr(Output, "append", interrupt)
        assert main(flags(checkpoint, *FIXED)) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == (
        "\ngenerate.py: interrupted; 2 of 5 requests are done, and the same command goes on from "
        "there\n"
    )
    assert len(answers(checkpoint)) == 2
    assert main(flags(checkpoint, *FIXED)) == 0 and len(answers(checkpoint)) == 5


def test_bad_lines_are_one_report_or_records(checkpoint, capsys):
    file = ask(checkpoint, [ASKED[0], {"prompt": "a", "max_tokens": 5}, {"id": "c", "prompt": ""}])
    file.write_text(file.read_text() + "{\n")
    assert main(flags(checkpoint, *PLAIN)) == 2
    err = capsys.readouterr().err
    assert not (checkpoint / "out.jsonl").exists()
    assert err.split("\n") == [
        f"generate.py: {file}: 3 lines cannot be used; correct them, or leave them out with "
        "--skip_bad",
        "  line 2: the key 'max_tokens' is unknown; known: id, prompt, prompt_file, messages, "
        "max_new_tokens, temperature, top_k, top_p, seed, stop",
        "  line 3: prompt is '', and should be a text that is not empty",
        "  line 4: not JSON: Expecting property name enclosed in double quotes, at character 1",
        "",
    ]
    for _ in range(2):
        assert main(flags(checkpoint, *PLAIN, "--skip_bad")) == 0
        found = records(checkpoint)
        assert [(r["line"], r.get("id"), "error" in r) for r in found] == [
            (2, "2", True), (3, "c", True), (4, None, True), (1, "a", False)
        ]  # fmt: skip
    assert "3 lines of" in capsys.readouterr().out
    file.write_text("{\n")
    (checkpoint / "out.jsonl").unlink()
    assert main(flags(checkpoint, *PLAIN, "--skip_bad")) == 0
    assert [r["line"] for r in records(checkpoint)] == [1]


def test_a_disk_that_gets_full_is_one_line(checkpoint, capsys):
    """A limit on the size of files stands for it."""
    ask(checkpoint)
    assert main(flags(checkpoint, *PLAIN)) == 0
    out, whole = checkpoint / "out.jsonl", answers(checkpoint)
    size = out.stat().st_size  # which times differ in by a few bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size - 400, size // 2, 9):
        out.unlink()
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert main(flags(checkpoint, *PLAIN)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        line = one_line(capsys)
        assert re.search(r"cannot write .*out.jsonl: File too large; [0-4] requests are done", line)
        assert main(flags(checkpoint, *PLAIN)) == 0 and answers(checkpoint) == whole


def test_a_directory_that_goes_ends_the_run_in_one_line(checkpoint, monkeypatch, capsys):
    ask(checkpoint)
    (checkpoint / "sub").mkdir()
    append = Output.append

    def move(self: Output, record: dict) -> None:
        if len(self.done) == 2:
            (checkpoint / "sub").rename(checkpoint / "away")
        append(self, record)

    more = flags(checkpoint, *PLAIN, "--output", str(checkpoint / "sub" / "out.jsonl"))
    with monkeypatch.context() as patched:
        patched.setattr(Output, "append", move)
        assert main(more) == 2
    line = one_line(capsys)
    assert "sub/out.jsonl was moved, deleted or replaced; 3 requests are done" in line
    (checkpoint / "away").rename(checkpoint / "sub")
    assert main(more) == 0 and "3 of 5 requests are done already" in capsys.readouterr().out
    (checkpoint / "sub" / "out.jsonl").rename(checkpoint / "out.jsonl")
    assert len(answers(checkpoint)) == 5


BAD_FLAGS = [
    (["--output", "/dev/full"], "no ordinary file"),
    (["--output", "."], "no ordinary file"),
    (["--output", ""], "no ordinary file"),
    (["--output", "/nowhere/out.jsonl"], "cannot write /nowhere/out.jsonl: No such file"),
    (["--output", "IN"], "are the same file"),
    (["--json", "OUT"], "are the same file"),
    (["--json", "IN"], "are the same file"),
    (["--max_gap", "0"], "--max_gap 0.0 must be a number of seconds above 0"),
    (["--max_gap", "nan"], "--max_gap nan"),
    (["--order", "shortest"], "shortest"),
    (["--profile", "x"], "--output has no --profile"),
    (["--interactive"], "one of --prompt"),
    (["--max_context", "9"], "3 lines cannot be used"),
    (["--chat"], "no chat_template"),
    (["--temperature", "-1"], "temperature"),
    (["--compare", "--draft", "none"], "needs a draft"),
    (["--batch_size", "0"], "--batch_size 0"),
]


@pytest.mark.parametrize(("more", "word"), BAD_FLAGS)
def test_unusable_flags_get_one_line(checkpoint, capsys, more, word):
    names = {"IN": str(ask(checkpoint)), "OUT": str(checkpoint / "out.jsonl")}
    before = names and (checkpoint / "in.jsonl").read_bytes()
    assert main(flags(checkpoint, *(names.get(f, f) for f in more))) == 2
    err = capsys.readouterr().err
    assert err.startswith("generate.py: ") and word in err and "Traceback" not in err
    assert err.count("\n") == 1 or "lines cannot" in err
    assert (checkpoint / "in.jsonl").read_bytes() == before


@pytest.mark.parametrize("more", [["--skip_bad"], ["--order", "first"], ["--max_gap", "1"]])
def test_flags_of_a_file_need_one(checkpoint, capsys, more):
    assert main(["--checkpoint_path", str(checkpoint), "--prompt", "a", *more]) == 2
    assert "--skip_bad, --order and --max_gap need --output" in one_line(capsys)
    assert main(["--checkpoint_path", str(checkpoint), "--output", "a"]) == 2
    assert "--output needs --prompts" in one_line(capsys)


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_one_line_of_a_terminal_or_lines_of_a_log(
    checkpoint, monkeypatch, capsys, live
):
    ask(checkpoint)
    monkeypatch.setattr(serve, "SHOW" if live else "LOG", 0.0)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: live, raising=False)
    assert main(flags(checkpoint, *FIXED, "--compare", "--batch_size", "2")) == 0
    err = capsys.readouterr().err
    lines = err.split("\r" if live else "\n")
    shown = [line for line in lines if "done" in line]
    assert len(shown) > 9 and err.count("\n") == (0 if live else len(lines) - 1)
    assert any(line.startswith("plainly: 0 of 5 done, ") for line in shown)
    last = r"4 of 5 done, 0 rows busy, [0-9.]+ tokens/s, acceptance length [1-6]\.\d\d, 0:00 left"
    assert re.match(last, shown[-1])
    assert not live or err.endswith("\r\x1b[K")


def test_json_on_standard_output_is_alone_there(checkpoint, capsys):
    ask(checkpoint)
    assert main(flags(checkpoint, *PLAIN, "--json", "-")) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)["baseline"]
    assert result["requests"] == 5 and result["busy_share"] <= 1
    assert result["prefill_seconds"] + result["decode_seconds"] <= result["seconds"] < 60
    assert {"mean", "median", "p99"} == result["ms_per_token"].keys()
    assert "rows busy" in captured.err


def test_a_file_of_one_token_answers_has_no_speedup(checkpoint, capsys):
    ask(checkpoint, [{"prompt": "x", "max_new_tokens": 1}] * 3)
    assert main(flags(checkpoint, *FIXED, "--compare")) == 0
    assert "3 of 3 outputs identical" in capsys.readouterr().out


def test_the_time_left_is_told_by_how_early_rows_end(monkeypatch, capsys):
    """10 s for 40 tokens. Answers have half of what they may have: 60 more are to come."""
    request = Request([1], 50)
    engine = SimpleNamespace(
        batch=SimpleNamespace(
            stats=lambda: Stats(20, 40, [20, 0, 10], [10, 0, 20]),
            finished=torch.tensor([True, False, False]),
        )
    )
    times = iter([100.0, 110.0, 110.1, 150.0])
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(serve, "LOG", 9.0)
    ticker = Ticker(engine, [request] * 4, "")
    ticker.count(Result(0, request, [7] * 25, "eos", Stats(1, 1, [], []), 0, 0.0, 0.0, 0.0))
    for _ in range(3):
        ticker.tick()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "1 of 4 done, 2 rows busy, 4.0 tokens/s, acceptance length 2.00, 0:15 left"
    assert second.endswith("0.8 tokens/s, acceptance length 2.00, 1:15 left")
