"""Every model family: logits and greedy text equal those of `transformers`.

The checkpoints under fixtures/models, and what they must answer, were written by
`scripts/make_model_fixtures.py`; where `transformers` is installed they are also made anew.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoint import load_model
from config import ModelConfig, load_config
from kv_cache import CacheSpec, KVCache
from model import Transformer
from policies import Strategy
from sampling import Sampling
from scripts.make_model_fixtures import FAMILIES, LENGTHS, NEW_TOKENS, SHARDED, make
from spec_decode import Engine, generate

FIXTURES = Path(__file__).parent / "fixtures" / "models"
DRAFTINGS = {
    "plain": Strategy(),
    "streaming": Strategy("streaming", 3, 24),
    "snapkv": Strategy("snapkv", 3, 24, obs_window=7, reselect_every=4),
    "ngram": Strategy("ngram", 3),
}


def load(directory: Path) -> tuple[Transformer, dict[str, torch.Tensor]]:
    with safe_open(directory / "expected.safetensors", framework="pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}
    return load_model(directory, torch.device("cpu"), torch.float32), expected


def check_logits(directory: Path) -> None:
    """At all lengths, read in one piece and in pieces."""
    model, expected = load(directory)
    for n in LENGTHS:
        tokens = expected["prompt"][None, :n]
        for piece in (n, 7):
            cache = KVCache.empty(CacheSpec.for_model(model, 1), n)
            logits = torch.cat([
                model(part, torch.arange(i * piece, i * piece + part.shape[1])[None], cache)
                for i, part in enumerate(tokens.split(piece, dim=1))
            ], dim=1)[0]  # fmt: skip
            difference = logits[expected[f"positions_{n}"]] - expected[f"logits_{n}"]
            assert difference.abs().max() < 1e-4 * expected[f"std_{n}"]


def check_text(directory: Path, strategy: Strategy) -> None:
    """Both prompts in one batch."""
    model, expected = load(directory)
    prompts = [expected["prompt"][:n].tolist() for n in LENGTHS[1:]]
    engine = Engine(model, 2, max(LENGTHS) + NEW_TOKENS, strategy, Sampling())
    outputs, stats = generate(engine, prompts, NEW_TOKENS)
    assert outputs == [expected[f"greedy_{n}"].tolist() for n in LENGTHS[1:]]
    assert bool(stats.drafts) == strategy.enabled


def test_a_directory_for_every_family():
    assert {path.name for path in FIXTURES.iterdir()} == set(FAMILIES)
    for name in FAMILIES:
        weights = list((FIXTURES / name).glob("model*.safetensors"))
        assert (len(weights) > 1) == (name in SHARDED)
        assert sum(path.stat().st_size for path in weights) < 200_000


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    check_logits(FIXTURES / name)


@pytest.mark.parametrize("strategy", DRAFTINGS.values(), ids=DRAFTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(name, strategy):
    check_text(FIXTURES / name, strategy)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_itself_if_it_is_here(name, tmp_path):
    pytest.importorskip("transformers")
    make(name, tmp_path)
    check_logits(tmp_path)
    for strategy in DRAFTINGS.values():
        check_text(tmp_path, strategy)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spelling_of_transformers_4(name):
    """Which has theta outside, and calls the scaling `rope_scaling`, its kind also `type`."""
    new = json.loads((FIXTURES / name / "config.json").read_text())
    rope = new["rope_parameters"]
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    assert ModelConfig.from_hf(old) == load_config(FIXTURES / name)


def test_what_the_fixtures_are_meant_to_exercise():
    configs = {name: load_config(FIXTURES / name) for name in FAMILIES}
    assert {c.n_group for c in configs.values()} >= {1, 2, 4, 7}
    assert configs["mistral-v0.1"].sliding_window == 64
    assert configs["mistral-v0.3"].sliding_window is None
    assert configs["qwen2.5"].qkv_bias and not configs["qwen2.5"].o_bias
    assert configs["llama-bias"].qkv_bias and configs["llama-bias"].o_bias
    assert configs["qwen3"].qk_norm
    assert configs["qwen3"].head_dim * configs["qwen3"].n_head != configs["qwen3"].dim
    assert configs["llama-3.2"].tie_embeddings
    scalings = {c.rope_scaling.kind for c in configs.values() if c.rope_scaling}
    assert scalings == {"linear", "llama3", "yarn"}
    assert configs["qwen2.5-yarn"].max_seq_len == 512  # 4 times the original context
