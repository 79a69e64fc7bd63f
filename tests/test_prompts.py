"""Prompts: what is read from files, what is refused by name, and rows that were made up."""

import json
from pathlib import Path

import pytest

from prompts import (
    DEMO_MODULES,
    check_lengths,
    demo_lengths,
    demo_prompts,
    fill_rows,
    module_source,
    read_jsonl,
    read_prompts,
    read_text,
)
from tokenizer import NumberTokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
TOKENIZER = load_tokenizer(FIXTURES / "gpt2")


def rows(
    texts=(), files=(), jsonl=None, n_rows=None, tokenizer=TOKENIZER, seed=1
) -> list[list[int]]:
    prompts = read_prompts(texts, files, jsonl, tokenizer.encode)
    return fill_rows(prompts, n_rows or len(prompts), tokenizer.vocab_size, seed)


def test_texts_become_rows_in_order(tmp_path):
    file, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    file.write_text("Grüße\n", encoding="utf-8")
    lines.write_text('{"prompt": "fox"}\n{"prompt": "漢\\u00e9", "id": 7}\n', encoding="utf-8")
    fox, greeting = TOKENIZER.encode("fox"), TOKENIZER.encode("Grüße\n")
    assert rows(["fox", "Grüße\n"]) == [fox, greeting]
    assert rows(files=[file, file]) == [greeting, greeting]
    assert rows(jsonl=lines) == [fox, TOKENIZER.encode("漢é")]
    assert rows(["fox", "Grüße\n"], n_rows=5) == [fox, greeting, fox, greeting, fox]


def test_texts_are_encoded_and_random_tokens_are_not():
    """As in a chat, which wraps what it encodes."""
    got = read_prompts(["Hi", "6"], [], None, lambda text: [0, *TOKENIZER.encode(text)])
    assert got == [[0, *TOKENIZER.encode("Hi")], 6]


def test_an_integer_is_that_many_random_tokens_different_in_every_row():
    tokenizer = NumberTokenizer(1000)
    made = rows(["50"], n_rows=8, tokenizer=tokenizer)
    assert [len(row) for row in made] == [50] * 8
    assert len(set(map(tuple, made))) == 8
    assert all(0 <= i < 1000 for row in made for i in row) and max(map(max, made)) > 900
    assert rows(["50"], n_rows=8, tokenizer=tokenizer) == made
    assert rows(["50"], n_rows=3, tokenizer=tokenizer) == made[:3]
    assert rows(["50"], n_rows=8, tokenizer=tokenizer, seed=2) != made
    mixed = rows(["fox", "9"], n_rows=4)
    assert mixed[0] == mixed[2] == TOKENIZER.encode("fox") and mixed[1] != mixed[3]


def test_an_integer_in_a_file_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("50")
    (tmp_path / "a.jsonl").write_text('{"prompt": "50"}')
    assert rows(files=[tmp_path / "a.txt"]) == [TOKENIZER.encode("50")]
    assert rows(jsonl=tmp_path / "a.jsonl") == [TOKENIZER.encode("50")]


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
    "prompts, max_new_tokens, words",
    [
        ([5], 100, "--max_new_tokens 100 does not fit into the context of 100"),
        ([[]], 8, "prompt 0 is empty"),
        ([[1], 0], 8, "prompt 1 is empty"),
        ([93], 8, "prompt 0 has 93 tokens; the context of 100 leaves room for 92 with"),
        ([[1], [1] * 93], 8, "prompt 1 has 93 tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(prompts, max_new_tokens, words):
    with pytest.raises(ValueError, match=words):
        check_lengths(prompts, 100, max_new_tokens)
    check_lengths([[1], 92, [1] * 92], 100, 8)  # just fit


def test_texts_that_cannot_be_prompts_are_refused():
    with pytest.raises(ValueError, match="--prompt 99999999999: a synthetic prompt of so many"):
        rows(["99999999999"])
    with pytest.raises(ValueError, match="--batch_size 1 is less than the 2 prompts"):
        rows(["a", "b"], n_rows=1)
    with pytest.raises(ValueError, match="the text is not UTF-8: its character 3"):
        rows(["caf\udce9"])


@pytest.mark.parametrize("n_rows", [1, 2, 7, 16, 45])
def test_demo_prompts_are_beginnings_of_modules_of_different_lengths(n_rows):
    prompts = demo_prompts(TOKENIZER, n_rows, 200)
    assert [len(p) for p in prompts] == demo_lengths(n_rows, 200)
    assert min(map(len, prompts)) == 156 and max(map(len, prompts)) == (200 if n_rows > 1 else 156)
    for row, prompt in enumerate(prompts):
        text = module_source(DEMO_MODULES[row % len(DEMO_MODULES)])
        assert text.startswith(TOKENIZER.decode(prompt).rstrip("\ufffd"))
    assert demo_lengths(n_rows, 1) == [1] * n_rows


def test_prompts_of_a_file_are_those_that_json_wrote(tmp_path):
    """Any text survives the way through a line of JSON."""
    texts = ["a\nb", "\u2028", '"', "\\", "\x00", "👩‍👩‍👧", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    assert read_jsonl(tmp_path / "a.jsonl") == texts
