"""Flags: parsed as their types say, checked, and never written to."""

import re
from dataclasses import fields

import pytest

from options import Options, parse_args


def test_what_is_drafted_follows_from_the_flags():
    def policies(*flags: str) -> list[str]:
        found = parse_args([*flags]).strategies(7)
        assert {strategy.gamma for strategy in found} == {7}
        return [strategy.policy for strategy in found]

    assert policies() == ["ngram", "mixed"]
    assert policies("--draft_budget", "6") == ["ngram", "mixed"]
    assert policies("--draft", "snapkv") == ["snapkv"]
    assert policies("--draft", "mixed") == ["ngram", "mixed"]
    assert policies("--draft", "mixed", "--reselect_every", "3") == ["ngram", "mixed"]
    assert policies("--draft", "mixed", "--gamma", "7") == ["mixed"]
    assert policies("--draft", "mixed", "--draft_checkpoint_path", "x") == ["mixed"]
    assert policies("--draft", "none") == ["none"]
    again = parse_args(["--reselect_every", "3"]).strategies(2)
    assert [strategy.reselect_every for strategy in again] == [None, 3]
    with pytest.raises(ValueError, match="draft_budget 5 must be at least n_sink"):
        policies("--draft_budget", "5")
    with pytest.raises(ValueError, match="nothing to reselect"):
        policies("--draft", "ngram", "--reselect_every", "3")


def test_options_are_what_was_given_and_stay_so():
    options = parse_args(["--prompt", "a", "--prompt", "b", "--no-compile", "--gamma", "3"])
    expected = Options(prompt=("a", "b"), compile=False, speculate_k=3)
    assert options == expected and parse_args(["--gamma", "3"]) == Options(speculate_k=3)
    with pytest.raises(AttributeError):
        options.seed = 1


def test_plain_decoding_is_compared_with_where_it_was_not_said():
    for flags, compares in [
        ([], True), (["--no-compare"], False), (["--prompt", "a"], False),
        (["--prompt", "a", "--check_lossless"], True), (["--draft", "none"], False),
    ]:  # fmt: skip
        assert parse_args(flags).compares == compares


def test_every_flag_is_of_its_fields_type():
    words = "--batch_size 3 --temperature 0.5 --prompt_file a --prompt_file b --json - --gamma 4"
    options = parse_args([*words.split(), "--ignore_eos", "--seed", "7", "--dtype", "float16"])
    assert (options.batch_size, options.temperature, options.seed) == (3, 0.5, 7)
    assert [path.name for path in options.prompt_file] == ["a", "b"]
    assert (options.json, options.speculate_k, options.dtype) == ("-", 4, "float16")
    assert options.ignore_eos and options.compile and options.compare is None
    assert parse_args(["--compare"]).compare and parse_args(["--no-compare"]).compare is False


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"], "What it does.")
    out = capsys.readouterr().out
    assert "What it does." in out
    for field in fields(Options):
        assert re.search(rf"--{field.name}\b", out)


@pytest.mark.parametrize(
    "values, word",
    [
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"batch_size": 2**31}, "--batch_size 2147483648 must be in"),
        ({"seed": -1}, "--seed -1"),
        ({"max_context": 1}, "--max_context 1"),
        ({"chat": True}, "--chat needs"),
        ({"draft": "none", "compare": True}, "--compare needs a draft"),
        ({"reselect_every": -1}, "--reselect_every -1 must be at least 0"),  # some could do without
        ({"draft": "foo", "speculate_k": 0}, "draft policy 'foo' is unknown"),  # nobody drafts
    ],
)
def test_options_made_by_hand_are_checked_too(values, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        Options(**values)
