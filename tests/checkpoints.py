"""Small checkpoint directories, laid out as Hugging Face lays them out."""

import json

import torch
from safetensors import TensorSpec, serialize_file

from model import Transformer, hf_weights


def write_checkpoint(path, model: Transformer, n_shards: int = 1, **config_changes) -> None:
    """A Hugging Face Llama directory of the model, as `save_pretrained` would name things."""
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": c.dim, "hidden_act": "silu",
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
        "intermediate_size": c.ffn_dim, "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "eos_token_id": [2, 5],
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | config_changes))
    weights = {name: w.contiguous() for name, w in hf_weights(model)}
    names = list(weights)
    if n_shards == 1:
        write_shard(path / "model.safetensors", weights)
        return
    weight_map = {n: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors"
                  for i, n in enumerate(names)}  # fmt: skip
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard in set(weight_map.values()):
        write_shard(path / shard, {n: weights[n] for n in names if weight_map[n] == shard})


def write_shard(path, weights: dict[str, torch.Tensor]) -> None:
    specs = {
        name: TensorSpec(
            dtype=str(w.dtype).removeprefix("torch."), shape=[*w.shape],
            data_ptr=w.data_ptr(), data_len=w.nbytes,
        )
        for name, w in weights.items()
    }  # fmt: skip
    serialize_file(specs, path, metadata={"format": "pt"})
