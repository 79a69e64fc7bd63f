"""What a run needs: what is small and refused first, and what the flags make of an engine."""

import pytest
import torch

import load
from generate import main
from load import load_weights, make_engine, open_all
from options import parse_args
from policies import Strategy
from sampling import Sampling
from tests.test_generate import one_line


@pytest.mark.parametrize("flags", [["--interactive"], ["--prompt", "x", "--prompt", "20"], []])
def test_the_size_is_checked_before_rows_are_made(monkeypatch, capsys, flags):
    """A list of a thousand million rows takes 8 GB."""
    monkeypatch.setattr(load, "read_rows", lambda *args: pytest.fail("too late"))
    assert main(["--batch_size", str(10**9), "--max_new_tokens", "1", *flags]) == 2
    assert "GiB free; use a smaller --batch_size or --max_context" in one_line(capsys)


def test_the_size_is_checked_before_the_weights_are_read(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(load, "load_weights", lambda *args: pytest.fail("too late"))
    monkeypatch.setattr("device.free_memory", lambda device: 2**20)
    flags = ["--checkpoint_path", str(checkpoint), "--prompt", "280", "--max_new_tokens", "9"]
    assert main([*flags, "--batch_size", "8"]) == 2
    assert "the KV caches need 0.0 GiB, but cpu has 0.0 GiB free" in one_line(capsys)


def test_flags_become_an_engine(checkpoint):
    """Its rows and its length are the caller's, all else the flags'."""
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_context", "99"]

    def made(*more: str):
        o = parse_args([*flags, *more])
        opened = open_all(o)
        assert opened.max_context == 99 and opened.end_ids == ((2,) if not o.ignore_eos else ())
        return make_engine(o, opened, 3, 77, Sampling(0.5, 9))

    named = ("--draft", "streaming", "--gamma", "4", "--draft_budget", "20")
    engine, auto = made(*named, "--draft_weights", "int8")
    assert auto is None and engine.drafter.strategy == Strategy("streaming", 4, 20, weights="int8")
    assert (engine.batch.n_rows, engine.max_len, engine.sampling) == (3, 77, Sampling(0.5, 9))
    engine, auto = made("--draft_budget", "20", "--ignore_eos")
    assert engine.drafter is None and auto.engine is engine and not auto.named
    assert [c.strategy.policy for c in auto.candidates] == ["ngram", "mixed"]
    spec = engine.full.spec
    assert engine.full.k[0].dtype == spec.dtype == torch.float32
    engine, auto = made("--draft", "ngram", "--kv_dtype", "bfloat16")
    assert engine.full.k[0].dtype == torch.bfloat16
    assert 2 * engine.full.n_bytes == sum(k.numel() for k in engine.full.k) * 2 * 4
    assert auto.named and [c.strategy.policy for c in auto.candidates] == ["ngram"]


def test_a_large_model_says_how_far_its_loading_is(checkpoint, monkeypatch, capsys):
    opened = open_all(parse_args(["--checkpoint_path", str(checkpoint)]))
    load_weights(opened.checkpoint, opened, False, None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(load, "LARGE", 1)
    load_weights(opened.checkpoint, opened, False, None)
    err = capsys.readouterr().err
    assert err.startswith(f"loading {checkpoint}: 0.0 GB ... ") and err.endswith("100% \n")
