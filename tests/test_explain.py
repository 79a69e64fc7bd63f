"""What is said of a round is what the round does: against the model itself, and other engines."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

import config
from checkpoint import DEMO_CHECKPOINT
from config import kv_bytes_per_token
from explain import Reads, Round, next_round, picture, show, word
from generate import main
from kv_cache import NEVER
from measure import decode
from policies import Strategy
from sampling import Sampling, row_seed
from spec_decode import Engine
from tests.reference import (
    latest_match,
    plain,
    plain_greedy,
    reference_logits,
    sinks_and_window,
    tiny_model,
)
from tests.test_drafters import STRATEGIES, draft_model
from tests.test_spec_decode import GREEDY, PROMPTS
from tokenizer import NumberTokenizer, load_tokenizer

PROMPT, GAMMA = PROMPTS[2], 3  # of 70 tokens; in row 0 here


def engine_of(name: str, sampling: Sampling = GREEDY, n: int = 16, **changes) -> Engine:
    """Prefilled, another row beside row 0."""
    policy, settings, context = STRATEGIES[name]
    strategy = Strategy(policy, GAMMA, n_sink=3, **settings)
    model, draft = tiny_model(**changes), draft_model(context) if context else None
    engine = Engine(model, 2, 110, strategy, sampling, draft_model=draft)
    prompts = [[token % model.config.vocab_size for token in p] for p in (PROMPT, PROMPTS[1])]
    engine.prefill(prompts, [n] * 2)
    return engine


def rounds_of(engine: Engine) -> Iterator[Round]:
    """Those of row 0, as they happen."""
    while not engine.watch.rows[0]:
        yield next_round(engine, GAMMA)


@pytest.mark.parametrize("name", [s for s in STRATEGIES if s.split()[-1] not in ("once", "int8")])
def test_a_round_is_told_as_it_happens(name):
    """Beside another engine, which is asked nothing and goes on as it would anyway."""
    model, truth, engine, twin = tiny_model(), PROMPT[:], engine_of(name), engine_of(name)
    truth += plain_greedy(model, PROMPT, 16)
    for r in rounds_of(engine):
        n = len(r.text)
        twin.refresh()
        draft = twin.draft(GAMMA)
        assert r.drafts == draft[0].tolist() and r.n_kept == int(twin.decide(draft)[0][0])
        assert r.says == [
            plain_greedy(model, r.text + r.drafts[:i], 1)[0] for i in range(GAMMA + 1)
        ]
        assert r.text == truth[:n] and r.new == truth[n : n + r.n_kept + 1]
        assert len(r.sight) == n and r.sight.strip(".")
        twin.round(GAMMA)
        assert int(twin.batch.seq_len[0]) == n + len(r.new) or twin.watch.rows[0]
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, p, 16) for p in (PROMPT, PROMPTS[1])]


def test_sampled_rounds_too():
    engine = engine_of("streaming", Sampling(0.9))
    for r in rounds_of(engine):
        told = [plain(engine.model, r.text + r.drafts[:i], 1, Sampling(0.9), row_seed(0, 0))[0]
                for i in range(GAMMA + 1)]  # fmt: skip
        assert r.says == told


def test_what_is_not_seen_has_no_part_in_the_draft():
    """The model itself, shown what the picture shows, says the first draft; and it is 12 tokens."""
    engine, n_kv = engine_of("streaming", n=9), kv_bytes_per_token(tiny_model().config, 4)
    for r in rounds_of(engine):
        n = len(r.text)
        assert r.sight == "sss" + "." * (n - 12) + "r" * 9
        visible = sinks_and_window(3, 9, n - 1)
        logits = reference_logits(engine.model, r.text, visible)
        assert int(logits[-1].argmax()) == r.drafts[0]
        assert r.drafting and r.drafting.kv == GAMMA * 12 * n_kv
        assert r.checking.kv == (n + GAMMA) * n_kv
        assert r.plainly.kv == sum(n + i for i in range(len(r.new))) * n_kv
        assert (r.drafting.n, r.checking.n, r.plainly.n) == (GAMMA, 1, len(r.new))


@pytest.mark.parametrize("name", ["snapkv", "chunks", "draft model, snapkv"])
def test_what_a_policy_chose_is_shown(name):
    """By the first head of the middle one of two layers, as its cache has it."""
    engine = engine_of(name)
    for r in rounds_of(engine):
        chosen = {p for p in engine.drafter.sparse.selected_pos[1, 0, 0].tolist() if p != NEVER}
        n_recent = engine.drafter.sparse.n_recent
        window = set(range(len(r.text) - n_recent, len(r.text)))
        seen = {p for p, sign in enumerate(r.sight) if sign != "."}
        assert seen >= window and (seen - window) == chosen - window
        assert {p for p, sign in enumerate(r.sight) if sign == "s"} == chosen & {0, 1, 2}
        assert "#" in r.sight and "layer 1" in r.where


def test_a_short_context_is_shown_where_it_lies_in_the_text():
    """A streaming draft model counts its places from 0; beyond the sinks they are the newest."""
    for r in rounds_of(engine_of("draft model, streaming")):
        assert r.sight == "sss" + "." * (len(r.text) - 12) + "r" * 9
    (r, *_) = rounds_of(engine_of("draft model, full"))
    assert r.sight == "=" * len(r.text)
    assert r.drafting.kv == sum(len(r.text) + i for i in range(GAMMA)) * 2 * 2 * 16 * 4


def test_a_layer_with_a_window_sees_the_newest_only():
    (r, *_) = rounds_of(engine_of("streaming", sliding_window=10))
    assert r.sight == "." * (len(r.text) - 10) + "r" * 10 and "layer 0" in r.where
    n_kv = kv_bytes_per_token(tiny_model().config, 4)
    assert (r.drafting.kv, r.checking.kv) == (GAMMA * 10 * n_kv, 10 * n_kv)


@pytest.mark.parametrize("name", ["ngram", "mixed"])
def test_prompt_lookup_shows_where_it_copies_from(name):
    """Of mixed only where lookup's words were taken; what was copied is what stands there."""
    copied = 0
    for r in rounds_of(engine_of(name, n=30, vocab_size=5)):
        if "m" not in r.sight and "c" not in r.sight:
            assert name == "mixed" and r.drafting
            continue
        copied += 1
        n_same = latest_match(r.text, 3, 1)[1]
        first = r.sight.index("m") if n_same else len(r.text) - 1
        assert r.text[first : first + n_same] == r.text[len(r.text) - n_same :]
        following = r.text[first + n_same :]
        assert r.drafts == [following[i % len(following)] for i in range(GAMMA)]
        assert bool(r.drafting) == (name == "mixed")
    assert copied


def test_a_plain_round_has_no_drafts():
    r = next_round(engine_of("streaming"), 0)
    assert (r.drafts, r.sight, r.drafting, r.n_kept, r.says) == ([], "", None, 0, r.new)


ROUND = Round(
    [5] * 30, [11, 12, 13], [11, 7, 4, 9], 1, [11, 7], "ss" + 18 * "." + "#....rrrrr", "",
    Reads(3, 3000, 2 * 10**6), Reads(1, 4500, 3 * 10**9), Reads(2, 4000, 6 * 10**9),
)  # fmt: skip


def test_the_text_of_a_round(monkeypatch):
    """What follows from a rejected draft stands in brackets, in columns."""
    monkeypatch.setenv("COLUMNS", "44")
    lines = [" ".join(line.split()) for line in show(ROUND, NumberTokenizer(99)).splitlines()]
    assert lines == [
        "30 tokens are decided: ...555555555555",
        "the draft sees s sinks, r newest, # chosen: 8 tokens",
        "[ss...........#...rrr]",
        "it drafts 11 12 13",
        "the model says 11 7 (4) (9)",
        "kept 1 of 3, then the model's own: 7",
        "drafting reads 3.0 kB of K and V, 2.0 MB of weights in 3 forwards",
        "checking reads 4.5 kB of K and V, 3.0 GB of weights in 1 forward, 4 tokens at once",
        "plain decoding 4.0 kB of K and V, 6.0 GB of weights in 2 forwards, for the same 2 tokens",
    ]
    ended = show(replace(ROUND, new=[11], drafting=None), NumberTokenizer(99))
    assert "then the model's own: 7, and the row ends" in ended
    assert "nothing but the text" in ended


def test_a_picture_has_the_width_of_the_line():
    """A sign stands for several tokens, and shows the rarest of them."""
    assert picture("s.#r", 80) == "[s.#r]"
    signs = picture("s" + "." * 57 + "#" + "." * 40 + "r", 25)
    assert len(signs) == 27 and signs == "[s" + "." * 13 + "#" + "." * 9 + "r]"
    assert picture("." * 99 + "m", 5) == "[" + "." * 19 + "m]"


def test_a_word_reads_as_it_stands_in_the_text():
    """With its blanks; a token without text of its own, such as half a character, by its id."""
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    ids = tokenizer.encode("def f():\n        return 'é…'")
    words = [word(tokenizer, ids[:i], token) for i, token in enumerate(ids)]
    assert words[0] == f"<{tokenizer.bos_id}>" and {"⏎", "········"} & {*words}
    text = "".join(w for w in words if not re.fullmatch(r"<\d+>", w))
    assert text == "def·f():⏎········return·'é…'"


def test_from_the_command_line(checkpoint, capsys, monkeypatch):
    given = ["--checkpoint_path", str(checkpoint), "--prompt", "import os\nclass", "--explain"]
    small = [
        "--draft",
        "streaming",
        "--gamma",
        "2",
        "--draft_budget",
        "9",
        "--draft_weights",
        "same",
    ]
    assert main([*given, *small, "--ignore_eos"]) == 0
    out = capsys.readouterr().out
    assert "round 3: " in out and "round 4" not in out and "in layer 1 by KV head 0" in out
    assert main([*given, "9", *small, "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "and the row ends" in out or "the row has ended" in out
    assert main([*given, "1", "--draft_budget", "9", "--max_new_tokens", "60"]) == 0
    assert "auto: " in capsys.readouterr().out
    monkeypatch.setitem(config.MODELS, "tiny", config.ModelConfig(32, 2, 4, 2, 8, 48, 99, 500))
    given = ["--checkpoint_path", "random:tiny", "--prompt", "50", "--explain", "1"]
    assert main([*given, "--draft", "ngram", "--gamma", "3"]) == 0
    assert "51 tokens are decided" in capsys.readouterr().out
