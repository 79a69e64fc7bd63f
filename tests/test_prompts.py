"""Prompts: what is read from files, what is refused by name, and rows that were made up."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from test_chat import CHATML

from chat import load_chat
from prompts import (
    DEMO_MODULES,
    demo_lengths,
    demo_prompts,
    module_source,
    read_jsonl,
    read_prompts,
    read_text,
)
from tokenizer import NumberTokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
TOKENIZER = load_tokenizer(FIXTURES / "gpt2")


def options(**given) -> Namespace:
    """The flags that matter here, as generate.py's parser leaves them."""
    flags = {"prompt": [], "prompt_file": [], "prompts": None, "interactive": False, "system": None,
             "batch_size": None, "max_new_tokens": 8, "seed": 1}  # fmt: skip
    return Namespace(**flags | given)


def rows(max_context: int = 100, tokenizer=TOKENIZER, chat=None, **given) -> list[list[int]]:
    return read_prompts(options(**given), tokenizer, chat, max_context)


def test_texts_become_rows_in_order(tmp_path):
    file, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    file.write_text("Grüße\n", encoding="utf-8")
    lines.write_text('{"prompt": "fox"}\n{"prompt": "漢\\u00e9", "id": 7}\n', encoding="utf-8")
    fox, greeting = TOKENIZER.encode("fox"), TOKENIZER.encode("Grüße\n")
    assert rows(prompt=["fox", "Grüße\n"]) == [fox, greeting]
    assert rows(prompt_file=[file, file]) == [greeting, greeting]
    assert rows(prompts=lines) == [fox, TOKENIZER.encode("漢é")]
    assert rows(prompt=["fox", "Grüße\n"], batch_size=5) == [fox, greeting, fox, greeting, fox]


def test_a_chat_wraps_texts_and_no_random_tokens(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "qwen3/tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(tmp_path)
    chat = load_chat(tmp_path, tokenizer)
    got = rows(tokenizer=tokenizer, chat=chat, prompt=["Hi", "6"], system="Be brief.")
    assert got[0] == chat.start("Hi", "Be brief.") and len(got[1]) == 6


def test_an_integer_is_that_many_random_tokens_different_in_every_row():
    tokenizer = NumberTokenizer(1000)
    made = rows(tokenizer=tokenizer, prompt=["50"], batch_size=8)
    assert [len(row) for row in made] == [50] * 8
    assert len(set(map(tuple, made))) == 8
    assert all(0 <= i < 1000 for row in made for i in row) and max(map(max, made)) > 900
    assert rows(tokenizer=tokenizer, prompt=["50"], batch_size=8) == made
    assert rows(tokenizer=tokenizer, prompt=["50"], batch_size=3) == made[:3]
    assert rows(tokenizer=tokenizer, prompt=["50"], batch_size=8, seed=2) != made
    mixed = rows(prompt=["fox", "9"], batch_size=4)
    assert mixed[0] == mixed[2] == TOKENIZER.encode("fox") and mixed[1] != mixed[3]


def test_an_integer_in_a_file_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("50")
    (tmp_path / "a.jsonl").write_text('{"prompt": "50"}')
    assert rows(prompt_file=[tmp_path / "a.txt"]) == [TOKENIZER.encode("50")]
    assert rows(prompts=tmp_path / "a.jsonl") == [TOKENIZER.encode("50")]


def test_marks_and_empty_lines_of_editors_are_no_text(tmp_path):
    """A byte order mark, Windows' line ends, and lines with nothing in them."""
    file = tmp_path / "a"
    file.write_bytes(b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n\n  \n{"prompt": "b\\r\\n"}')
    assert read_jsonl(file) == ["a", "b\r\n"]
    file.write_bytes(b"\xef\xbb\xbffox")
    assert read_text(file) == "fox"


@pytest.mark.parametrize(
    "line",
    ["5", "[]", '"prompt"', "null", "{", "{}", '{"text": "a"}', '{"prompt": 5}',
     '{"prompt": null}', '{"prompt": "\\ud800"}', "[" * 10**5, '{"prompt": "a"} x', "prompt"],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + '\n{"prompt": "b"}\n')
    with pytest.raises(ValueError) as error:
        read_jsonl(file)
    assert str(error.value) == f'{file}, line 3: not an object with a text "prompt"'


def test_files_that_are_no_text_are_named(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a is not UTF-8 text \(byte 3\); convert it first"):
        read_text(file)
    for nothing in ("", "\n \n"):
        file.write_text(nothing)
        with pytest.raises(ValueError, match='a has no prompts: a line is {"prompt": "..."}'):
            read_jsonl(file)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"max_new_tokens": 100}, "--max_new_tokens 100 does not fit into the context of 100"),
        ({"prompt": [""]}, "prompt 0 is empty"),
        ({"prompt": ["a", "0"]}, "prompt 1 is empty"),
        ({"prompt": ["93"]}, "prompt 0 has 93 tokens; the context of 100 leaves room for 92 with"),
        ({"prompt": ["99999999999"]}, "--prompt 99999999999: a synthetic prompt of so many"),
        ({"prompt": ["a", "b"], "batch_size": 1}, "--batch_size 1 is less than the 2 prompts"),
        ({"prompt": ["caf\udce9"]}, "the text is not UTF-8: its character 3"),
    ],
)
def test_refusals(given, words):
    with pytest.raises(ValueError, match=words):
        rows(**given)
    assert rows(prompt=["92"])  # just fits


@pytest.mark.parametrize(
    "given, size",
    [
        ({"interactive": True}, (10**9, 100)),
        ({"prompt": ["x", "20"]}, (10**9, 28)),
        ({}, (10**9, 100)),
    ],
)
def test_the_size_is_checked_before_rows_are_made(given, size):
    """A list of a thousand million rows takes 8 GB."""

    def refuse(*asked):
        raise ValueError(f"too much: {asked}")

    with pytest.raises(ValueError) as error:
        read_prompts(options(batch_size=10**9, **given), TOKENIZER, None, 100, refuse)
    assert str(error.value) == f"too much: {size}"
    assert read_prompts(options(interactive=True, batch_size=3), TOKENIZER, None, 100) == [[]] * 3


@pytest.mark.parametrize("n_rows", [1, 2, 7, 16, 45])
def test_demo_prompts_are_beginnings_of_modules_of_different_lengths(n_rows):
    prompts = demo_prompts(TOKENIZER, n_rows, 200)
    assert [len(p) for p in prompts] == demo_lengths(n_rows, 200)
    assert min(map(len, prompts)) == 156 and max(map(len, prompts)) == (200 if n_rows > 1 else 156)
    for row, prompt in enumerate(prompts):
        text = module_source(DEMO_MODULES[row % len(DEMO_MODULES)])
        assert text.startswith(TOKENIZER.decode(prompt).rstrip("\ufffd"))
    assert rows(max_context=208, batch_size=n_rows) == prompts
    assert demo_lengths(n_rows, 1) == [1] * n_rows


def test_prompts_of_a_file_are_those_that_json_wrote(tmp_path):
    """Any text survives the way through a line of JSON."""
    texts = ["a\nb", "\u2028", '"', "\\", "\x00", "👩‍👩‍👧", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    assert read_jsonl(tmp_path / "a.jsonl") == texts
