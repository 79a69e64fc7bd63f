"""Write a Llama as a Hugging Face directory: what the training, tests and benchmarks make."""

from dataclasses import replace
from pathlib import Path

from safetensors import TensorSpec, serialize_file

from checkpoint import hf_weights
from families import read_config
from files import write_json
from model import Transformer


def save_model(model: Transformer, checkpoint_dir: Path, n_shards: int = 1, **config) -> None:
    """Write a Llama as a Hugging Face directory; `config` replaces or adds `config.json` fields.

    ValueError for a model of another family.

    The index is written last and files are replaced whole, so an interruption leaves no half one.
    A single file that shards replace is deleted then: it would go before them.
    """
    hf = llama_json(model)
    if read_config(hf) != replace(model.config, rope_scaling=None):  # has a trait that is not there
        raise ValueError("save_model writes the Llama family only")
    weights = {name: w.cpu().contiguous() for name, w in hf_weights(model)}
    names = ["model.safetensors"]
    if n_shards > 1:
        names = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    weight_map = {tensor: names[i % n_shards] for i, tensor in enumerate(weights)}
    for name in names:
        specs = {  # the low-level interface: safetensors.torch.save_file wants NumPy
            tensor: TensorSpec(
                dtype=str(w.dtype).removeprefix("torch."),
                shape=[*w.shape],
                data_ptr=w.data_ptr(),
                data_len=w.nbytes,
            )
            for tensor, w in weights.items()
            if weight_map[tensor] == name
        }
        part = checkpoint_dir / f"{name}.part"
        serialize_file(specs, part, metadata={"format": "pt"})
        part.chmod(0o644)
        part.replace(checkpoint_dir / name)
    write_json(hf | config, checkpoint_dir / "config.json")
    if n_shards > 1:
        write_json({"weight_map": weight_map}, checkpoint_dir / "model.safetensors.index.json")
        (checkpoint_dir / "model.safetensors").unlink(missing_ok=True)


def llama_json(model: Transformer) -> dict:
    """The `config.json` of a Llama of this model's sizes."""
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_seq_len,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
        "mlp_bias": False,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }
