"""Tiny checkpoints of every model family, as Hugging Face writes them, and what they answer.

    pip install transformers                # nothing else here needs it
    python scripts/make_model_fixtures.py   # writes tests/fixtures/models

Each directory has random weights of odd sizes, saved by `save_pretrained`, and
`expected.safetensors`: a prompt, the logits that `transformers` gives after some of its tokens when
it reads 1, 17 or 300 of them, and the 64 tokens that its greedy `generate` adds to 17 and to 300.
`tests/test_families.py` holds our model against them, without `transformers`; where that is
installed, it also makes them anew.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "fixtures" / "models"
LENGTHS = (1, 17, 300)
NEW_TOKENS = 64
SHARD_BYTES = 50_000


def llama3_rope(factor: float) -> dict:
    return {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def theta(value: float) -> dict:
    return {"rope_type": "default", "rope_theta": value}


# name -> model type, query heads, KV heads, head dim, and what else its config says
FAMILIES = {
    "llama-2": ("llama", 3, 3, 12, {}),
    "llama-3": ("llama", 4, 1, 10, {"rope_parameters": theta(5e5)}),
    "llama-3.1": ("llama", 4, 2, 14, {"rope_parameters": llama3_rope(8.0)}),
    "llama-3.2": ("llama", 8, 2, 8,
                  {"rope_parameters": llama3_rope(32.0), "tie_word_embeddings": True}),
    "llama-linear": ("llama", 2, 2, 16, {"rope_parameters": theta(1e4)
                                         | {"rope_type": "linear", "factor": 4.0}}),
    "llama-bias": ("llama", 4, 2, 8, {"attention_bias": True}),
    "tinyllama": ("llama", 8, 1, 6, {}),
    "yi": ("llama", 7, 1, 8, {"rope_parameters": theta(5e6), "rms_norm_eps": 1e-5}),
    "mistral-v0.1": ("mistral", 4, 1, 12, {"sliding_window": 64}),
    "mistral-v0.3": ("mistral", 4, 2, 12, {"sliding_window": None,
                                           "rope_parameters": theta(1e6)}),
    "qwen2.5": ("qwen2", 7, 1, 8, {"rope_parameters": theta(1e6), "tie_word_embeddings": True}),
    "qwen2.5-yarn": ("qwen2", 4, 2, 12, {
        "max_position_embeddings": 128,
        "rope_parameters": theta(1e6) | {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 128}}),
    "qwen3": ("qwen3", 4, 2, 14, {"rope_parameters": theta(1e6)}),
    "phi-3": ("phi3", 4, 2, 10, {"sliding_window": 61}),
    "gemma-2": ("gemma2", 4, 2, 14, {"sliding_window": 13, "query_pre_attn_scalar": 9,
                                     "num_hidden_layers": 3, "attn_logit_softcapping": 3.0,
                                     "final_logit_softcapping": 2.0}),
    "gemma-2-draft": ("gemma2", 2, 1, 8, {"sliding_window": 7, "num_hidden_layers": 2,
                                          "tie_word_embeddings": False}),
    "gemma-3": ("gemma3_text", 4, 1, 12, {
        "sliding_window": 11, "num_hidden_layers": 5, "sliding_window_pattern": 3,
        "rope_parameters": {"full_attention": theta(1e6) | {"rope_type": "linear", "factor": 8.0},
                            "sliding_attention": theta(1e4)}}),
}  # fmt: skip
SHARDED = ("llama-3.1", "mistral-v0.1", "qwen2.5-yarn")


def make_model(name: str, seed: int):
    """A transformers model with weights large enough that everything in it matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, n_head, n_kv_head, head_dim, more = FAMILIES[name]
    wide = kind in ("qwen3", "gemma2", "gemma3_text")  # heads wider than the model
    dim = 40 if wide else n_head * head_dim
    config = AutoConfig.for_model(
        kind, hidden_size=dim, intermediate_size=dim // 2 + 9, vocab_size=103,
        num_attention_heads=n_head, num_key_value_heads=n_kv_head, head_dim=head_dim,
        bos_token_id=1, eos_token_id=None, pad_token_id=None,
        **{"max_position_embeddings": 512, "num_hidden_layers": 2} | more,
    )  # fmt: skip
    # Only its plain attention caps scores.
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    plus_one = "gemma" in kind  # its norms add 1 themselves
    for tensor_name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.3
        if plus_one and "embed" in tensor_name:
            scale /= p.shape[-1] ** 0.5  # is multiplied by it, and would outweigh all layers
        p.data = noise * scale + (p.dim() == 1 and "norm" in tensor_name and not plus_one)
    return model


def answers(model, seed: int) -> dict[str, torch.Tensor]:
    """What `expected.safetensors` holds; ValueError if its text would be a bad test."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, model.config.vocab_size, (max(LENGTHS),), generator=generator)
    found = {"prompt": prompt}
    for n in LENGTHS:
        logits = model(prompt[None, :n]).logits[0]
        found[f"positions_{n}"] = positions = torch.arange(0, n, n // 10 + 1)
        found[f"logits_{n}"] = logits[positions].contiguous()
        found[f"std_{n}"] = logits.std()
    for n in LENGTHS[1:]:
        text = model.generate(prompt[None, :n], max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        top = model(text[None, :-1]).logits[0, n - 1 :].topk(2).values
        if (top[:, 0] - top[:, 1]).min() < 2e-3 * found[f"std_{n}"]:
            raise ValueError("two tokens are nearly equally likely")
        if len(set(text[n:].tolist())) < 6:
            raise ValueError("the text says nothing")
        found[f"greedy_{n}"] = text[n:]
    return found


def make(name: str, out: Path) -> None:
    """Write one family's directory, with the first seed whose text is a test."""
    from safetensors.torch import save_file

    with torch.inference_mode():
        for seed in range(100):
            model = make_model(name, seed)
            try:
                expected = answers(model, seed)
                break
            except ValueError:
                continue
        out.mkdir(parents=True, exist_ok=True)
        sharding = {"max_shard_size": SHARD_BYTES} if name in SHARDED else {}
        model.save_pretrained(out, **sharding)
        save_file(expected, out / "expected.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    for name in args.names:
        if name not in FAMILIES:
            sys.exit(f"{name} is not a family; there are {', '.join(FAMILIES)}")
        make(name, args.out / name)
        print(f"wrote {args.out / name}")


if __name__ == "__main__":
    main()
