"""The command line from outside: numbers, JSON, text, and one line for everything unusable."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

import checkpoint as checkpoint_module
import config
import generate
import load
from chat import load_chat
from checkpoint import DEMO_CHECKPOINT, load_model
from generate import main
from prompts import demo_prompts
from scripts.save_model import save_model
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tokenizer import continuation, load_tokenizer

ROOT = Path(generate.__file__).parent
PLAIN = ["--draft", "none"]
FIXED = ["--draft", "streaming", "--gamma", "5"]  # where the choice must not follow the clock


def run(checkpoint: Path, *flags: str) -> tuple[int, dict]:
    """Exit status and JSON of an eager run, with draft weights that are the same everywhere."""
    file = checkpoint / "out.json"
    given = ["--checkpoint_path", str(checkpoint), "--no-compile", "--draft_weights", "same"]
    status = main([*given, "--json", str(file), *flags])
    return status, json.loads(file.read_text())


def test_json_has_the_numbers_and_the_outputs(checkpoint, capsys):
    (checkpoint / "a.txt").write_text("import os\n" * 9, encoding="utf-8")
    (checkpoint / "b.txt").write_text("class Grüße:", encoding="utf-8")
    files = [f for name in "ab" for f in ("--prompt_file", str(checkpoint / f"{name}.txt"))]
    flags = [*files, "--max_new_tokens", "30", "--draft", "streaming", "--draft_budget", "12",
             "--gamma", "3", "--check_lossless", "--ignore_eos"]  # fmt: skip
    status, result = run(checkpoint, *flags)
    assert status == 0 and result["identical"] is True
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    for row, text in zip(result["outputs"], ["import os\n" * 9, "class Grüße:"], strict=True):
        ids = tokenizer.encode(text)
        assert row["prompt_length"] == len(ids)
        assert row["token_ids"] == plain_greedy(model, ids, 30)
        assert row["text"] == continuation(tokenizer, ids, row["token_ids"])
        assert row["finish_reason"] == "length"
    assert result["plan"] == {"strategy": "streaming", "draft_budget": 12, "gamma": 3}
    ours, plain = result["speculative"], result["baseline"]
    assert ours["generated_tokens"] == plain["generated_tokens"] == 60
    assert len(ours["acceptance_rate_per_position"]) == 3
    assert sum((n + 1) * rows for n, rows in enumerate(ours["accepted_histogram"])) == 58
    for r in (ours, plain):
        assert r["decode_tokens_per_second"] == pytest.approx(58 / r["decode_seconds"])
    assert plain["ms_per_token"] == pytest.approx(1e3 * plain["decode_seconds"] / 29)
    assert "draft_step_ms" in ours and "draft_step_ms" not in plain
    rate = ours["decode_tokens_per_second"] / plain["decode_tokens_per_second"]
    assert result["speedup"] == pytest.approx(rate)
    assert {"device", "dtype", "torch", "threads"} <= result["environment"].keys()
    assert "speedup" in capsys.readouterr().out


@pytest.fixture
def draft_checkpoint(tmp_path) -> Path:
    """Another model with the same tokenizer, a padded vocabulary and a context of 40 tokens."""
    path = tmp_path / "draft"
    path.mkdir()
    save_model(tiny_model(2, 1, 4100, seed=5), path, max_position_embeddings=40)
    shutil.copy(DEMO_CHECKPOINT / "tokenizer.model", path)
    return path


def test_every_way_to_draft_from_the_command_line(checkpoint, draft_checkpoint, capsys):
    given = ["--prompt", "import os\n" * 20, "--max_new_tokens", "20", "--check_lossless"]
    given += ["--gamma", "5"]
    small = ["--draft_budget", "20", "--obs_window", "6"]
    other = ["--draft_checkpoint_path", str(draft_checkpoint)]
    for flags, plan, words in [
        (["--draft", "ngram"], {}, "prompt lookup, matches of at most 3 tokens, gamma 5"),
        (["--draft", "snapkv", *small, "--reselect_every", "2"],
         {"draft_budget": 20, "select_every": 2}, "(4 sinks), selected again every 2 rounds"),
        (["--draft", "snapkv", *small, "--reselect_every", "0"],
         {"draft_budget": 20}, "self-speculation, snapkv draft cache of 20 tokens"),
        ([*other, "--draft", "streaming", "--draft_budget", "20"],
         {"draft_budget": 20, "select_every": 3},
         f"draft model {draft_checkpoint}, streaming draft cache"),
    ]:  # fmt: skip
        status, result = run(checkpoint, *given, *flags)
        assert status == 0 and words in capsys.readouterr().out
        strategy = flags[flags.index("--draft") + 1]
        assert result["plan"] == {"strategy": strategy, "gamma": 5} | plan
        assert ("draft_model" in result) == (flags[0] == other[0])
    short = ["--prompt", "x", "--max_new_tokens", "9", "--check_lossless", "--gamma", "5"]
    assert run(checkpoint, *short, *other, "--draft", "full")[0] == 0
    assert "full draft cache, gamma 5" in capsys.readouterr().out


@pytest.mark.parametrize("own_model", [False, True])
@pytest.mark.parametrize(
    "flags, names",
    [
        ([], ["ngram", "mixed 40"]),
        (["--draft", "streaming"], ["streaming 40"]),
        (["--speculate_k", "2"], ["ngram", "mixed 40"]),
    ],
)
def test_automatic_choices_are_explained(
    checkpoint, draft_checkpoint, capsys, flags, names, own_model
):
    given = ["--prompt", "import os\n" * 20, "--max_new_tokens", "30", "--check_lossless"]
    if own_model:
        given += ["--draft_checkpoint_path", str(draft_checkpoint)]
        names = [n.replace("40", "20") for n in names]
        own = "draft model, streaming 20"
        names = [own] if flags[:1] == ["--draft"] else [*names, own]
    budget = ["--draft_budget", "20" if own_model else "40"]
    status, result = run(checkpoint, *given, "--obs_window", "6", *budget, *flags)
    out, plan = capsys.readouterr().out, result["plan"]
    assert status == 0 and f"auto: {', '.join(names)}; gamma of" in out
    assert "predicted speedup" in out and "T_T" in out and "fit within" in out
    considered = [c["draft"] for c in plan["candidates"]]
    assert sorted(considered + [d.split(":")[0] for d in plan["dropped"]]) == sorted(names)
    if flags[:1] == ["--draft"]:  # this one, from the first round on, whether it pays or not
        assert plan["gamma"] in (2, 5) and considered == names
        assert "(the draft as asked)" in out and "no draft" not in out
        assert result["speculative"]["accepted_histogram"][0] > 0
    else:
        assert plan["predicted_speedup"] >= 1 and plan["gamma"] in (0, 2, 5, 12)
        assert "or no draft" in out
    assert {"speculative", "baseline", "speedup"} <= result.keys()


def small_tokenizer(path: Path, words: str) -> Path:
    """A sentencepiece model of 270 tokens, learnt from these words."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=file, vocab_size=270,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    path.mkdir()
    (path / "tokenizer.model").write_bytes(file.getvalue())
    return path


def test_a_draft_with_another_vocabulary_is_refused(checkpoint, tmp_path, capsys):
    one, two = (small_tokenizer(tmp_path / w.split()[0], w) for w in ("abra ka", "dabra mi"))
    save_model(tiny_model(vocab_size=270), one)
    save_model(tiny_model(vocab_size=270), two)
    for target, draft, words in [
        (checkpoint, one, "they have 270 and 4096 tokens"),
        (one, two, "both have 270 tokens, but others"),
    ]:
        flags = ["--checkpoint_path", str(target), "--draft_checkpoint_path", str(draft)]
        assert main([*flags, "--no-compile", "--prompt", "a", "--max_new_tokens", "5"]) == 2
        assert words in one_line(capsys)


def test_plain_run_has_no_speculative_keys(checkpoint):
    status, result = run(
        checkpoint, "--prompt", "x = 1", "--draft", "none", "--max_new_tokens", "9"
    )
    assert status == 0 and result["plan"] == {"strategy": "none", "gamma": 0}
    assert "baseline" in result and not {"speculative", "speedup", "identical"} & result.keys()


def test_eos_is_a_finish_reason(checkpoint):
    flags = ["--prompt", "x = 1", "--max_new_tokens", "20", *FIXED]
    _, free = run(checkpoint, *flags, "--ignore_eos")
    eos = free["outputs"][0]["token_ids"][6]
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    _, result = run(checkpoint, *flags)
    row = result["outputs"][0]
    assert row["finish_reason"] == "eos" and row["token_ids"][-1] == eos
    assert row["token_ids"] == free["outputs"][0]["token_ids"][: len(row["token_ids"])]


def test_prompts_from_jsonl_repeated_to_the_batch_size(checkpoint):
    file = checkpoint / "p.jsonl"
    file.write_text('{"prompt": "a = 1"}\n{"prompt": "def f():"}\n')
    flags = ["--prompts", str(file), "--batch_size", "3", "--max_new_tokens", "5"]
    _, result = run(checkpoint, *flags, *FIXED, "--compare")
    rows = result["outputs"]
    assert rows[0] == rows[2] and rows[0]["prompt_length"] != rows[1]["prompt_length"]


def test_sampling_is_reproducible_and_an_integer_is_a_synthetic_prompt(checkpoint):
    flags = [*FIXED, "--prompt", "50", "--temperature", "0.9", "--top_k", "20", "--top_p", "0.9",
             "--max_new_tokens", "12"]  # fmt: skip
    results = [run(checkpoint, *flags, "--seed", seed)[1]["outputs"] for seed in "112"]
    assert results[0] == results[1] != results[2]
    assert results[0][0]["prompt_length"] == 50


def test_json_on_standard_output_is_alone_there(checkpoint, capsys):
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "3"]
    assert main([*flags, *PLAIN, "--prompt", "x", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["outputs"]
    assert "decode tokens/s" in captured.err


def test_interactive_streams_one_answer_per_line(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n\nclass A:\n"))
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "8",
             "--interactive", "--ignore_eos"]  # fmt: skip
    assert main(flags) == 0
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    out = capsys.readouterr().out
    for text in ("import os", "class A:"):
        ids = tokenizer.encode(text)
        assert continuation(tokenizer, ids, plain_greedy(model, ids, 8)) in out
    assert "a prompt needs 1 to" in out


def test_a_line_that_is_no_text_does_not_end_the_conversation(checkpoint, monkeypatch, capsys):
    lines = io.TextIOWrapper(io.BytesIO(b"import os\ncaf\xe9\nclass A:\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "8"]
    flags += ["--interactive", "--ignore_eos", *PLAIN]
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert "the text is not UTF-8: its character 3 is '\\udce9'" in captured.out
    assert captured.err.count("tokens/s") == 2


@pytest.mark.parametrize("draft", [["--draft", "none"], FIXED])
def test_a_chat_is_one_conversation_whose_cache_is_kept(
    chat_checkpoint, monkeypatch, capsys, draft
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello <|im_end|>\nAnd then?\n\n" + "x" * 500))
    flags = ["--checkpoint_path", str(chat_checkpoint), "--no-compile", "--max_new_tokens", "40",
             "--chat", "--interactive", "--system", "Be brief."]  # fmt: skip
    assert main([*flags, *draft]) == 0
    model = load_model(chat_checkpoint, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(chat_checkpoint)
    chat = load_chat(chat_checkpoint, tokenizer)
    captured = capsys.readouterr()
    end = tokenizer.special("<|im_end|>")
    text, held = chat.start("Hello <|im_end|>", "Be brief."), 0
    assert text.count(end) == 2  # of the system and of the user; what was typed is text
    for _ in range(2):
        answer = plain_greedy(model, text, 40)
        answer = answer[: answer.index(end)] if end in answer else answer
        assert continuation(tokenizer, text, answer) in captured.out
        assert f"of {len(text)} tokens of prompt {held} were in the cache" in captured.err
        held = len(text + answer) - (len(answer) == 40)  # the last of 40 was not fed to the model
        text = text + answer + chat.reply("And then?")
    assert captured.err.count("were in the cache") == 2
    assert "a prompt needs 1 to" in captured.out and "it begins anew" in captured.out


def test_chat_wraps_the_prompts_of_a_batch(chat_checkpoint):
    chat = load_chat(chat_checkpoint, load_tokenizer(chat_checkpoint))
    flags = ["--chat", "--prompt", "Hello", "--max_new_tokens", "4"]
    _, result = run(chat_checkpoint, *flags, *PLAIN)
    assert result["outputs"][0]["prompt_length"] == len(chat.start("Hello"))


def test_random_weights_need_no_directory(monkeypatch, capsys):
    monkeypatch.setitem(config.MODELS, "tiny", config.ModelConfig(32, 2, 4, 2, 8, 48, 99, 500))
    monkeypatch.setattr(load, "LARGE", 1)
    flags = ["--checkpoint_path", "random:tiny", "--no-compile", "--max_new_tokens", "6"]
    assert main([*flags, "--prompt", "50", *FIXED, "--check_lossless"]) == 0
    captured = capsys.readouterr()
    assert "1 of 1 outputs identical" in captured.out
    assert "loading random:tiny: 0.0 GB ... 100%" in captured.err
    assert main([*flags, "--prompt", "text"]) == 2
    assert "give --prompt N" in capsys.readouterr().err
    assert main([*flags, "--prompt", "50", "--chat"]) == 2


def too_kind(engine, draft, logits):
    """An acceptance rule that is none: all drafts stay."""
    return torch.full((len(draft),), draft.shape[1]), logits[:, -1].argmax(dim=-1)


def test_a_difference_is_reported_with_its_place_and_margin(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "accept", too_kind)
    flags = [*FIXED, "--prompt", "import os", "--max_new_tokens", "40", "--draft_budget", "5",
             "--check_lossless"]  # fmt: skip
    status, result = run(checkpoint, *flags)
    assert status == 1 and result["identical"] is False
    out = capsys.readouterr().out
    assert "row 0 differs from new token" in out and "top-2 logit margin" in out


def test_one_new_token_and_a_first_token_that_ends_the_row(checkpoint, capsys):
    """Nothing is left for the rounds: no division by zero, no speedup."""
    status, result = run(checkpoint, "--prompt", "x", "--max_new_tokens", "1", "--compare")
    assert status == 0 and "speedup" not in result and result["identical"]
    assert len(result["outputs"][0]["token_ids"]) == 1
    assert "nothing was left to decode" in capsys.readouterr().out


def test_sampled_outputs_are_those_of_plain_decoding_too(checkpoint, capsys):
    flags = ["--prompt", "x", "--max_new_tokens", "20", "--check_lossless", *FIXED]
    status, result = run(checkpoint, *flags, "--temperature", "1")
    assert status == 0 and result["identical"] and result["speedup"] > 0
    out = capsys.readouterr().out
    assert "1 of 1 outputs identical" in out and "of which accepting" in out


def test_exact_pads_every_step_of_the_target(checkpoint, capsys):
    """Also where the program chooses gamma: not the longest, which every step would pay for."""
    given = ["--prompt", "import os\n" * 9, "--max_new_tokens", "20", "--exact"]
    given += ["--dtype", "bfloat16", "--check_lossless"]
    for flags, gamma in (["--draft", "ngram", "--gamma", "2"], 2), (["--draft", "ngram"], 5):
        status, result = run(checkpoint, *given, *flags)
        assert status == 0 and result["identical"]
        assert result["environment"]["padded_to_drafts"] == gamma
        words = f"exact: every step of the target is of {gamma + 1} tokens"
        assert words in capsys.readouterr().out


def test_sampled_text_depends_on_the_seed_alone(checkpoint):
    flags = [*FIXED, "--prompt", "x", "--max_new_tokens", "20", "--temperature", "1"]
    alone, compared = (run(checkpoint, *flags, *more)[1] for more in ([], ["--compare"]))
    assert alone["outputs"] == compared["outputs"]


def test_interruption_leaves_no_file(checkpoint, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "rounds", interrupt)
    out = checkpoint / "out.json"
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--prompt", "x", *FIXED,
             "--json", str(out)]  # fmt: skip
    assert main(flags) == 130
    assert not list(checkpoint.glob("out.json*"))


def test_a_profile_is_a_trace(checkpoint):
    trace = checkpoint / "trace.json"
    run(checkpoint, "--prompt", "x", "--max_new_tokens", "4", "--profile", str(trace), *PLAIN)
    assert json.loads(trace.read_text())["traceEvents"]


BAD_FLAGS = [
    (["--max_new_tokens", "0"], "--max_new_tokens 0"),
    (["--max_new_tokens", "300"], "context of 300"),
    (["--batch_size", "0"], "--batch_size 0"),
    (["--batch_size", "1", "--prompt", "a", "--prompt", "b"], "2 prompts"),
    (["--batch_size", "10000000", "--prompt", "a"], "free"),
    (["--speculate_k", "-1"], "speculate_k -1"),
    (["--speculate_k", "99"], "0..32"),
    (["--speculate_k", "two"], "--speculate_k"),
    (["--draft", "none", "--speculate_k", "auto", "--compare"], "needs a draft"),
    (["--draft_budget", "4"], "at least n_sink"),
    (["--draft", "streming"], "known: none, streaming"),
    (["--temperature", "-1"], "temperature"),
    (["--top_k", "5"], "greedy"),
    (["--dtype", "float8"], "float8"),
    (["--kv_dtype", "float8"], "--kv_dtype float8 needs a GPU; on a CPU use --kv_dtype bfloat16"),
    (["--device", "tpu9"], "tpu9"),
    (["--prompt", ""], "empty"),
    (["--prompt", "word " * 400], "leaves room for"),
    (["--prompt", "a", "--interactive"], "one of"),
    (["--chat"], "--chat needs a --prompt"),
    (["--explain", "0"], "--explain 0 must be at least 1"),
    (["--explain", "--draft", "none"], "--explain needs a draft"),
    (["--explain", "2", "--interactive"], "--explain has no --output, --interactive, --json"),
    (["--explain", "--prompt", "a", "--json", "-"], "--explain has no --output"),
    (["--explain", "--compare"], "--explain has no --output"),
    (["--prompts", "a", "--output", "b", "--explain"], "--explain has no --output"),
    (["--system", "a"], "--system needs --chat"),
    (["--seed", "99999999999999999999"], "--seed 99999999999999999999 must be in"),
    (["--max_context", "1"], "--max_context 1 must be at least 2"),
    (["--max_context", "50", "--prompt", "60", "--max_new_tokens", "9"], "context of 50 leaves"),
    (["--checkpoint_path", "random:llama-2-7b", "--interactive"], "needs a tokenizer"),
    (["--chat", "--prompt", "a"], "no chat_template"),
    (["--check_lossless", "--no-compare"], "--no-compare"),
    (["--prompt_file", "/nowhere/a.txt"], "/nowhere/a.txt"),
    (["--prompt", "99999999999999"], "99999999999999"),
    (["--prompt", "9999999"], "leaves room for"),
    (["--speculate_k", "0", "--compare"], "needs a draft"),
    (["--draft", "none", "--check_lossless"], "needs a draft"),
    (["--draft", "none", "--compare"], "needs a draft"),
    (["--draft", "none", "--exact"], "--exact needs a draft"),
    (["--prompt", "a", "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    (["--prompt", "a", "--profile", "/"], "cannot write /"),
    (["--interactive", "--json", "-"], "--interactive has no"),
    (["--interactive", "--max_new_tokens", "300"], "context of 300"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--no_such_flag"], "no_such_flag"),
    (["--draft", "snapkv", "--draft_budget", "5"], "n_sink + obs_window + 1 = 6"),
    (["--draft", "snapkv", "--obs_window", "0"], "obs_window 0"),
    (
        ["--draft", "streaming", "--reselect_every", "5"],
        "nothing to reselect; use it with snapkv, ",
    ),
    (["--draft", "full"], "--draft_checkpoint_path"),
    (["--draft", "foo", "--speculate_k", "0"], "draft policy 'foo' is unknown; known: none, "),
    (["--draft", "auto", "--reselect_every", "-1"], "--reselect_every -1 must be at least 0"),
    (["--draft_checkpoint_path", "/nowhere/draft"], "/nowhere/draft/config.json does not exist"),
    (["--draft_checkpoint_path", "x", "--draft", "none"], "needs a draft"),
    (["--batch_size", "1000000000", "--prompt", "a"], "GiB free; use a smaller --batch_size"),
    (["--batch_size", "1000000000", "--prompt", "5"], "GiB free; use a smaller --batch_size"),
    (["--batch_size", "1000000000"], "GiB free; use a smaller --batch_size"),
    (["--batch_size", "1000000000", "--interactive"], "GiB free; use a smaller --batch_size"),
    (["--batch_size", "1000000000000"], "--batch_size 1000000000000 must be in 1..2**31 - 1"),
    (["--gamma", "0", "--check_lossless"], "--check_lossless needs a draft"),
    (["--gamma", "two"], "'two' is neither an integer nor auto"),
    (["--temperature", "1e-46"], "temperature 1e-46 must be at least"),
    (["--temperature", "1", "--top_p", "1e-46"], "top_p 1e-46 must be"),
    (["--prompt", "caf\udce9"], "the text is not UTF-8: its character 3 is '\\udce9'"),
    (["--prompt", "a", "--json", ""], "--json needs the name of a file"),
    (["--prompt", "a", "--json", "/proc/version"], "--json: cannot write /proc/version"),
    (["--prompt", "a", "--profile", "/proc/new"], "--profile: cannot write /proc/new"),
    (["--json", "/dev/null", "--profile", "/dev/null"], "are the same file, /dev/null"),
]


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("generate.py: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize("flags, word", BAD_FLAGS)
def test_unusable_flags_get_one_line(checkpoint, capsys, flags, word):
    assert main(["--checkpoint_path", str(checkpoint), "--no-compile", *flags]) == 2
    assert word in one_line(capsys)


def test_unusable_files_get_one_line(checkpoint, tmp_path, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    number = tmp_path / "number.jsonl"
    number.write_text('{"prompt": 5}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    given = ["--checkpoint_path", str(checkpoint), "--no-compile"]
    for flags, word in [
        (["--prompt_file", str(latin)], "not UTF-8"),
        (["--prompts", str(broken)], "line 2"),
        (["--prompts", str(empty)], "empty.jsonl has no prompts"),
        (["--prompts", str(number)], "line 1"),
    ]:
        assert main([*given, *flags]) == 2
        assert word in one_line(capsys)


def test_unusable_checkpoints_get_one_line(checkpoint, tmp_path, capsys):
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    good, whole = json.loads(config.read_text()), weights.read_bytes()

    def refused(path: Path, *words: str) -> None:
        given = ["--checkpoint_path", str(path), "--no-compile", "--prompt", "a"]
        assert main([*given, "--draft_budget", "9"]) == 2
        line = one_line(capsys)
        assert all(word in line for word in words)

    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "does not exist")
    (tmp_path / "gpt2").mkdir()
    gpt2 = json.dumps({"architectures": ["GPT2LMHeadModel"], "n_embd": 768})
    (tmp_path / "gpt2" / "config.json").write_text(gpt2)
    refused(tmp_path / "gpt2", "GPT2LMHeadModel", "LlamaForCausalLM")
    (checkpoint / "generation_config.json").write_text("{")
    refused(checkpoint, "generation_config.json", "not valid JSON")
    (checkpoint / "generation_config.json").unlink()
    config.write_text(json.dumps(good | {"intermediate_size": 57}))
    refused(checkpoint, "mlp.", "57")
    config.write_text(json.dumps(good | {"vocab_size": 100}))
    refused(checkpoint, "100")
    config.write_text(json.dumps(good))
    weights.write_bytes(whole[:5000])
    refused(checkpoint, "corrupt")
    weights.unlink()
    refused(checkpoint, "model.safetensors does not exist")
    config.write_text(json.dumps(good | {"eos_token_id": [*range(17)] * 2}))
    refused(checkpoint, "17 tokens end a text (eos_token_id)")  # and no word of the weights


def test_an_answer_ends_where_the_chat_format_says(chat_checkpoint, monkeypatch):
    """The end token of the format is often not among those of config.json."""
    flags = ["--prompt", "Hello", "--max_new_tokens", "20", *PLAIN]
    _, free = run(chat_checkpoint, *flags, "--chat", "--ignore_eos")
    token_ids = free["outputs"][0]["token_ids"]
    end = token_ids[6]
    other = lambda *args: replace(load_chat(*args), end_id=end)  # noqa: E731
    monkeypatch.setattr(checkpoint_module, "load_chat", other)
    _, result = run(chat_checkpoint, *flags, "--chat")
    row = result["outputs"][0]
    assert row["finish_reason"] == "eos"
    assert row["token_ids"] == token_ids[: token_ids.index(end) + 1]
    _, without = run(chat_checkpoint, *flags)
    assert len(without["outputs"][0]["token_ids"]) == 20


def test_what_a_terminal_cannot_show_is_escaped(checkpoint, monkeypatch):
    path = checkpoint.rename(checkpoint.with_name("Grüße"))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    flags = ["--checkpoint_path", str(path), "--no-compile", "--max_new_tokens", "3", *PLAIN]
    assert main([*flags, "--prompt", "x"]) == 0
    shown = raw.getvalue().decode("ascii")
    assert "Gr\\xfc\\xdfe: " in shown and "decode tokens/s" in shown


class ClosesAtTheTable(io.StringIO):
    """A pipe whose reader has seen enough."""

    def write(self, text: str) -> int:
        if "decode tokens/s" in text:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_finished_run_is_kept_when_something_cannot_be_written(checkpoint, monkeypatch, capsys):
    """Nobody reads on: the file is written. No room for the trace: table and file are there."""
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "3", *PLAIN]
    flags += ["--prompt", "x", "--json", str(checkpoint / "out.json")]
    monkeypatch.setattr(sys, "stdout", ClosesAtTheTable())
    assert main(flags) == 2
    assert "nobody reads the output any more" in one_line(capsys)
    assert json.loads((checkpoint / "out.json").read_text())["outputs"]
    (checkpoint / "out.json").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *args: None)
    assert main([*flags, "--profile", str(checkpoint / "trace.json")]) == 2
    captured = capsys.readouterr()
    assert "decode tokens/s" in captured.out
    assert captured.err.count("\n") == 1 and "trace.json: the trace does not fit" in captured.err
    assert json.loads((checkpoint / "out.json").read_text())["outputs"]


def test_numbers_go_into_a_pipe_and_leave_it_one(checkpoint):
    pipe = checkpoint / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--max_new_tokens", "3", *PLAIN]
    assert main([*flags, "--prompt", "x", "--json", str(pipe)]) == 0
    assert pipe.is_fifo() and json.loads(os.read(reader, 2**16))["outputs"]
    os.close(reader)


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_closed_streams_are_told_before_the_run(checkpoint, monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, stream, None)
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile"]
    flags += ["--interactive"] if stream == "stdin" else ["--prompt", "a"]
    assert main(flags) == 2
    assert "must be open" in one_line(capsys)


def test_memory_that_runs_out_on_the_cpu_is_one_line(monkeypatch, capsys):
    """There it is a RuntimeError like any other, and the others are mistakes of ours."""
    monkeypatch.setattr(generate, "load", lambda options: torch.empty(10**14))
    assert main(["--prompt", "a"]) == 2
    assert "out of memory; use a smaller --batch_size or --max_context" in one_line(capsys)
    monkeypatch.setattr(generate, "load", lambda options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        main(["--prompt", "a"])


def test_an_interruption_of_the_imports_is_one_too(tmp_path):
    """A torch in front of the real one interrupts while it is imported.

    A shell's background jobs ignore interruptions, and so would what they start.
    """
    wait = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(wait)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "generate.py"]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\ngenerate.py: interrupted\n")


def test_without_a_cpp_compiler_it_runs_eagerly_and_says_so_once(checkpoint):
    env = os.environ | {"CXX": "/nowhere/g++"}
    command = [sys.executable, "generate.py", "--checkpoint_path", str(checkpoint)]
    command += ["--prompt", "a = 1", "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("running eagerly") == 1
    assert "decode tokens/s" in done.stdout


def test_a_context_with_room_for_one_token_still_has_demo_prompts(checkpoint):
    status, result = run(checkpoint, "--batch_size", "2", "--max_new_tokens", "299", "--ignore_eos")
    assert status == 0 and result["outputs"][0]["prompt_length"] == 1


def test_demo_prompts_are_ragged_and_as_long_as_said():
    prompts = demo_prompts(load_tokenizer(DEMO_CHECKPOINT), 16, 3840)
    lengths = [len(p) for p in prompts]
    assert min(lengths) == 3000 and max(lengths) == 3840 and len(set(lengths)) == 16
    assert abs(sum(lengths[:8]) - sum(lengths[8:])) < 200


def test_demo_checkpoint_runs_compiled_on_its_own_prompts(tmp_path):
    """A line of the README's first command, smaller: two rows and fewer tokens."""
    out = tmp_path / "out.json"
    assert (
        main(
            [
                *FIXED,
                "--batch_size",
                "2",
                "--max_new_tokens",
                "40",
                "--check_lossless",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert result["identical"] and result["environment"]["compiled"]
    assert result["speculative"]["draft_acceptance_rate"] > 0.3


def test_demo_checkpoint_reproduces_recorded_logits():
    """`tests/demo_logits.json` was recorded with transformers by scripts/check_demo.py."""
    recorded = json.loads((ROOT / "tests" / "demo_logits.json").read_text())
    model = load_model(DEMO_CHECKPOINT, torch.device("cpu"), torch.float32)
    n, greedy = len(recorded["token_ids"]), recorded["greedy_64"]
    ids = torch.tensor([recorded["token_ids"] + greedy])
    logits = model(ids, torch.arange(n + 64)[None])[0, n - 1 :]
    values = torch.tensor(recorded["last_logits"])
    assert (logits[0] - values).abs().max() < 1e-4 * values.std()
    assert logits[:-1].argmax(dim=-1).tolist() == greedy  # each follows from those before it
