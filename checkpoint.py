"""A Hugging Face directory, opened once; weights read.

`open_checkpoint` reads what is small: config, tokenizer, chat format. `Checkpoint.load` then reads
the weights, and until then nothing large is made, so that whatever is wrong with a directory is
said at once. `random:NAME` stands for a directory of a preset's geometry with random weights.

A checkpoint is data from strangers. Only safetensors are opened, never a pickle, which is a
program. The names and shapes in all headers are compared with the config before anything is
allocated, and every number must be finite.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chat import Chat, load_chat
from config import ModelConfig, is_random, open_json, total_params
from device import check_fits
from families import load_config
from model import Block, Transformer, rope_frequencies
from parallel import Shard
from tokenizer import NumberTokenizer, Tokenizer, load_tokenizer

DEMO_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = DTYPES | {"float8": torch.float8_e4m3fn}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors call them


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds beside its weights."""

    path: Path  # or random:NAME
    config: ModelConfig
    tokenizer: Tokenizer
    chat: Chat | None  # its chat format, where one was asked for

    def encode(self, text: str, system: str | None = None, so_far: Sequence[int] = ()) -> list[int]:
        """Token ids of a prompt, in the chat format if there is one; none of an empty text.

        `system` is the chat's system message; None: the format's own. In a chat the ids of the
        conversation `so_far` come first. ValueError for what is no text.
        """
        if not text:
            return []
        if self.chat is None:
            return self.tokenizer.encode(text)
        if so_far:
            return [*so_far, *self.chat.reply(text)]
        return self.chat.start(text, system)

    def end_ids(self, at_most: int) -> tuple[int, ...]:
        """The tokens that end a text, and the one that ends an answer in the chat format.

        ValueError if they are more than `at_most`.
        """
        ids = eos_token_ids(self.path) + ((self.chat.end_id,) if self.chat else ())
        ids = tuple(dict.fromkeys(ids))
        if len(ids) > at_most:
            raise ValueError(
                f"{self.path}: {len(ids)} tokens end a text (eos_token_id); at most {at_most} "
                f"are possible"
            )
        return ids

    def check_same_vocabulary(self, draft: "Checkpoint") -> None:
        """ValueError unless both models speak of the same tokens; padding rows do not matter."""
        ours, theirs = self.tokenizer, draft.tokenizer
        n, m = ours.vocab_size, theirs.vocab_size
        why = f"they have {m} and {n} tokens" if n != m else f"both have {n} tokens, but others"
        if n != m or any(ours.decode([i]) != theirs.decode([i]) for i in range(n)):
            raise ValueError(
                f"{draft.path} cannot draft for {self.path}: {why}; "
                f"take a draft model of the same family"
            )

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        on_tensor: Callable[[int, int], None] = lambda done, total: None,  # bytes of the model
        shard: Shard | None = None,
    ) -> Transformer:
        """The model with its weights, see `load_model`."""
        return load_model(self.path, device, dtype, on_tensor, self.config, shard)


def open_checkpoint(checkpoint_dir: Path, chat: bool = False) -> Checkpoint:
    """Read all of a directory but its weights; with `chat` also its chat format.

    OSError for a file that is missing, ValueError for one that cannot be used, and for a tokenizer
    that does not belong to the model.
    """
    config = load_config(checkpoint_dir)
    if is_random(checkpoint_dir):
        tokenizer: Tokenizer = NumberTokenizer(config.vocab_size)
    else:
        tokenizer = load_tokenizer(checkpoint_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint_dir}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"only {config.vocab_size}: they do not belong together"
        )
    form = load_chat(checkpoint_dir, tokenizer) if chat else None
    return Checkpoint(checkpoint_dir, config, tokenizer, form)


def hf_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a Hugging Face checkpoint: its name, and where it lives in our model.

    The tensors are views of the parameters (q, k, v and gate, up are row slices of the fused
    ones), so a loader copies into them and an exporter copies from them.
    """
    c = model.config
    yield "model.embed_tokens.weight", model.tok_embeddings.weight.data
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        for name, place in (*projections(layer), *norms(layer)):
            yield prefix + name, place
    yield "model.norm.weight", model.norm.weight.data
    if not c.tie_embeddings:
        yield "lm_head.weight", model.output.weight.data


def projections(layer: Block) -> Iterator[tuple[str, Tensor]]:
    """The matrices and biases of a layer by their names in files, q, k, v and gate, up apart.

    Phi-3's files have them as one tensor each, stacked as ours are.
    """
    attention, feed_forward = layer.attention, layer.feed_forward
    c = attention.config
    heads = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
    for kind, p in attention.wqkv.named_parameters():  # weight, bias
        rows = p.data.split(sum(heads) if c.fused_weights else heads)
        for name, place in zip(("qkv",) if c.fused_weights else "qkv", rows, strict=True):
            yield f"self_attn.{name}_proj.{kind}", place
    for kind, p in attention.wo.named_parameters():
        yield f"self_attn.o_proj.{kind}", p.data
    halves = ("gate_up",) if c.fused_weights else ("gate", "up")
    places = feed_forward.w_gate_up.weight.data.chunk(len(halves))
    for name, place in zip(halves, places, strict=True):
        yield f"mlp.{name}_proj.weight", place
    yield "mlp.down_proj.weight", feed_forward.w_down.weight.data


def norms(layer: Block) -> Iterator[tuple[str, Tensor]]:
    """The norms of a layer by their names in files; Gemma names the second one after its place."""
    attention = layer.attention
    if attention.config.qk_norm:
        yield "self_attn.q_norm.weight", attention.q_norm.weight.data
        yield "self_attn.k_norm.weight", attention.k_norm.weight.data
    yield "input_layernorm.weight", layer.attention_norm.weight.data
    if layer.post_norms:
        yield "post_attention_layernorm.weight", layer.attention_post_norm.weight.data
        yield "pre_feedforward_layernorm.weight", layer.ffn_norm.weight.data
        yield "post_feedforward_layernorm.weight", layer.ffn_post_norm.weight.data
    else:
        yield "post_attention_layernorm.weight", layer.ffn_norm.weight.data


def load_model(
    checkpoint_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,  # bytes of the model
    config: ModelConfig | None = None,  # None: read from the directory
    shard: Shard | None = None,  # what to load of it; None: all
) -> Transformer:
    """The model of a Hugging Face directory: `config.json` and safetensors, single or sharded.

    All headers and sizes are checked before anything is allocated; then one tensor at a time goes
    from the memory-mapped file to its place, so that there is never a second full copy.
    `random:NAME` instead of a directory makes random weights of a preset's geometry. Raises OSError
    for a file that cannot be read, and ValueError, naming file and tensor; NaN and infinity are no
    weights.
    """
    config, random = config or load_config(checkpoint_dir), is_random(checkpoint_dir)
    headers = {} if random else read_headers(weight_files(checkpoint_dir))
    what, own = f"the weights of {checkpoint_dir}", shard.config if shard else config
    n_bytes = total_params(own) * dtype.itemsize
    check_fits(n_bytes, device, what, lambda share: "a smaller model or --dtype")
    if not random:
        check_headers(checkpoint_dir, headers, config)
    with torch.device("meta"):
        model = Transformer(own).to(dtype)
    if shard:
        shard.trim(model)
    total, done = sum(p.nbytes for p in model.parameters()), 0
    on_tensor(0, total)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight  # to_empty made them two
    model.rope_freq = rope_frequencies(config).to(device)
    if random:
        randomize(model)
        on_tensor(total, total)
    for name, place in hf_weights(model) if not random else ():
        path = headers[name].shard
        if shard:
            shard.read(name, partial(tensor_of, path, name), place)
        else:
            with safe_open(path, framework="pt") as file:  # anew: what was mapped is forgotten
                place.copy_(file.get_tensor(name))
        if not all(end.isfinite() for end in place.aminmax()):  # NaN is both ends
            raise ValueError(
                f"{path}: {name} has NaN or infinite numbers in "
                f"{str(dtype).removeprefix('torch.')}; download it again, or take a wider --dtype"
            )
        done += place.nbytes
        on_tensor(done, total)
    if shard:
        shard.apply(model)
    return model


def randomize(model: Transformer) -> None:
    """Weights as at the start of a training: their values mean nothing, their reading costs."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if model.config.norm_plus_one and "norm" in name else 1.0)
        else:
            p.normal_(0, 0.02)


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The safetensors files of a directory, all of which exist.

    As in transformers, model.safetensors goes before an index, which may be left over. Raises
    FileNotFoundError, or ValueError if the index is malformed.
    """
    index = checkpoint_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists() and not (checkpoint_dir / names[0]).is_file():
        weight_map = open_json(index)["weight_map"].value
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{index} has no object weight_map that names files")
        names = sorted(set(named))
    for name in names:
        if not name or Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a file name in this directory")
        if not (checkpoint_dir / name).is_file():
            pickles = sorted(path.name for path in checkpoint_dir.glob("*.bin"))
            hint = "the download is incomplete"
            if pickles and not index.exists():
                hint = f"{pickles[0]} is a pickle, which is never opened; convert it to safetensors"
            raise FileNotFoundError(f"{checkpoint_dir / name} does not exist; {hint}")
    return [checkpoint_dir / name for name in names]


class Header(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    shard: Path
    shape: list[int]
    dtype: str  # as safetensors calls it


@contextmanager
def tensor_of(shard: Path, name: str) -> Iterator[Any]:
    """A tensor of a file, of which a slice is a copy; the file is mapped meanwhile."""
    with safe_open(shard, framework="pt") as file:
        yield file.get_slice(name)


def read_headers(shards: list[Path]) -> dict[str, Header]:
    """The tensors of all shards by name, none of which is in two.

    safetensors refuses a header that does not fit the size of its file. Raises OSError or
    ValueError for a file that cannot be used.
    """
    found: dict[str, Header] = {}
    for shard in shards:
        shard.open("rb").close()  # safetensors calls every file that it cannot open missing
        try:
            os.fspath(shard).encode()
            with safe_open(shard, framework="pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}
                headers = {
                    n: Header(shard, h.get_shape(), h.get_dtype()) for n, h in headers.items()
                }
        except UnicodeEncodeError:
            raise ValueError(
                f"{shard}: safetensors opens paths in UTF-8 only; rename the directory"
            ) from None
        except SafetensorError as e:
            raise ValueError(f"{shard} is corrupt or incomplete ({e}); download it again") from None
        for name in headers.keys() & found.keys():
            raise ValueError(f"{shard}: tensor {name} is in {found[name].shard.name} already")
        found |= headers
    return found


def check_headers(checkpoint_dir: Path, headers: dict[str, Header], config: ModelConfig) -> None:
    """ValueError unless the files hold exactly the tensors of these sizes."""
    there = {name.split(".")[2] for name in headers if name.startswith("model.layers.")}
    n_layer = min(config.n_layer, len(there) + 1)  # a typing error may ask for millions
    with torch.device("meta"):
        places = dict(hf_weights(Transformer(replace(config, n_layer=n_layer))))
    per_layer = sum(name.startswith("model.layers.0.") for name in places)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()  # is the embedding
    unexpected, misshapen = [], []
    for name, (shard, shape, dtype) in headers.items():
        if name.endswith("rotary_emb.inv_freq") or name in ignored:  # follows from the config
            continue
        if name not in places:
            unexpected.append(name)
        elif shape != [*places[name].shape]:
            misshapen.append(f"{name} {shape}, should be {[*places[name].shape]}")
        elif dtype not in STORED_DTYPES:
            raise ValueError(
                f"{shard}: {name} has dtype {dtype}; supported: {', '.join(STORED_DTYPES)}"
            )
    missing = [name for name in places if name not in headers]
    n_missing = len(missing) + (config.n_layer - n_layer) * per_layer
    wrong = [("missing", missing, n_missing), ("unexpected", unexpected, len(unexpected)),
             ("misshapen", misshapen, len(misshapen))]  # fmt: skip
    if missing or unexpected or misshapen:
        lists = "; ".join(f"{kind}: {some(names, n)}" for kind, names, n in wrong if names)
        raise ValueError(f"{checkpoint_dir}: the tensors are not config.json's; {lists}")


def some(names: list[str], n: int) -> str:
    """The first few of n names."""
    more = n - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def eos_token_ids(checkpoint_dir: Path) -> tuple[int, ...]:
    """End-of-text tokens of generation_config.json, else of config.json. ValueError: no ids."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint_dir / name
        ids = open_json(path)["eos_token_id"].value if path.exists() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and abs(i) < 2**31 for i in ids):
                raise ValueError(
                    f"{path}: eos_token_id = {brief(ids)} is not a token id or a list of them"
                )
            return tuple(ids)
    return ()
