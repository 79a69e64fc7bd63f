"""Sizes and traits of a model, and what follows from them."""

from dataclasses import replace

import pytest

from config import MODELS, ModelConfig, kv_bytes, total_params, visible_tokens
from model import Transformer
from tests.reference import tiny_model

SMALL = ModelConfig(dim=4, n_layer=6, n_head=2, n_kv_head=1, head_dim=2, ffn_dim=3, vocab_size=5)


@pytest.mark.parametrize("window, every, windows", [
    (None, None, (None,) * 6),
    (None, 2, (None,) * 6),
    (7, None, (7,) * 6),
    (7, 1, (None,) * 6),
    (7, 2, (7, None) * 3),
    (7, 4, (7, 7, 7, None, 7, 7)),
    (7, 6, (7,) * 5 + (None,)),
    (7, 9, (7,) * 6),
])  # fmt: skip
def test_which_layers_have_a_window(window, every, windows):
    config = replace(SMALL, sliding_window=window, full_every=every)
    assert config.windows == windows
    for n, margin in ((1, 0), (7, 0), (8, 0), (100, 0), (8, 5), (100, 5)):
        seen = sum(n if w is None else min(n, w + margin) for w in windows)
        assert visible_tokens(config, n, margin) == seen
        if not margin:
            assert kv_bytes(config, n, 4) == seen * 2 * 1 * 2 * 4  # K and V, heads, head_dim


def test_scales():
    assert SMALL.attention_scale == 2**-0.5 and SMALL.embedding_scale == 1
    config = replace(SMALL, query_pre_attn_scalar=25, scaled_embedding=True)
    assert config.attention_scale == 0.2 and config.embedding_scale == 2


@pytest.mark.parametrize("changes, words", [
    ({"sliding_window": 0}, "sliding_window = 0 is not a positive integer"),
    ({"full_every": 0}, "sliding_window_pattern = 0 is not"),
    ({"full_every": 1.5}, "sliding_window_pattern = 1.5 is not"),
    ({"attention_cap": -1.0}, "attn_logit_softcapping = -1.0 is not a positive number"),
    ({"logit_cap": float("inf")}, "final_logit_softcapping = inf is not"),
    ({"local_rope_theta": 0.1}, "rope_local_base_freq = 0.1 must be at least 1"),
    ({"scaled_embedding": 1}, "scaled_embedding = 1 is neither true nor false"),
    ({"n_kv_head": None}, "num_key_value_heads = None is not"),
])  # fmt: skip
def test_strange_traits_are_refused_by_their_names_in_config_json(changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        replace(SMALL, **changes)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"post_norms": True}])
def test_parameters_are_counted(changes):
    model = tiny_model(**changes)
    assert total_params(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, billions", [
    ("llama-3.1-8b", 8.03), ("gemma-2-9b", 9.24), ("gemma-3-1b", 1.0), ("phi-3-mini-4k", 3.82),
    ("qwen2.5-7b", 7.62),
])  # fmt: skip
def test_presets_are_as_large_as_their_names_say(name, billions):
    assert total_params(MODELS[name]) == pytest.approx(billions * 1e9, rel=0.005)


def test_presets_can_be_built():
    """With two layers and a small vocabulary; on no device."""
    import torch

    for config in MODELS.values():
        with torch.device("meta"):
            Transformer(replace(config, n_layer=2, vocab_size=100))
