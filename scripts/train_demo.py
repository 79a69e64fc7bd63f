"""Train the demo checkpoint again: tokenizer and model, from Python source that is already here.

    python scripts/train_demo.py --out checkpoints/demo

The data is what every machine with the requirements installed has: the standard library and the
sources of the installed packages, without tests, generated tables and vendored copies. Twenty
well-known standard modules (DEMO_MODULES) are never trained on, nor is any file of the same name:
the demo's prompts are cut from them. The model is written as a Hugging Face Llama directory.

Context starts short and is lengthened: most of what a small model learns needs 512 tokens, and
long windows cost attention time. In a third of the windows a passage is pasted again further on,
so that the model learns to copy over any distance it is trained at: that is what a long context is
for, and what a sparse draft cache can lose. Matrices are optimised by Muon, the rest by AdamW.
"""

import argparse
import io
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generate import DEMO_MODULES, module_source
from model import ModelConfig, Transformer, compile_blocks, save_model, write_json

SKIPPED = {
    "test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "_vendor", "_distutils", "encodings", "pydoc_data", "lib2to3", "_bundled", "lib-dynload",
}  # fmt: skip
PACKAGES = ("torch", "sympy", "networkx", "mpmath", "jinja2", "fsspec", "setuptools", "_pytest",
            "requests", "urllib3", "pygments", "pip")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training at one context length."""

    context: int  # tokens in a window
    tokens: int  # tokens trained on in this phase


PHASES = (Phase(512, 7_000_000), Phase(2048, 3_500_000), Phase(4096, 2_000_000))
TOKENS_PER_STEP = 8192
TOKENIZER_CONFIG = {  # with which transformers reads tokenizer.model as we do
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}
DEMO = ModelConfig(
    dim=256, n_layer=6, n_head=4, n_kv_head=4, head_dim=128, ffn_dim=704, vocab_size=4096,
    max_seq_len=4096, rope_theta=100_000.0, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip


def is_prose(text: str) -> bool:
    """False for generated tables: few letters, or very long lines."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    lines = text.count("\n") + 1
    return len(text) > 200 and letters > 0.7 * len(text) and len(text) < 100 * lines


def sources() -> Iterator[tuple[str, str]]:
    """(kind, text) of every training file, kind "stdlib" or "package", each text once."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    site = Path(torch.__file__).resolve().parents[1]
    seen: set[str] = set()
    for kind, root in [("stdlib", stdlib), *(("package", site / p) for p in PACKAGES)]:
        for path in sorted(root.rglob("*.py")):
            names = set(path.relative_to(root).parts[:-1]) | {path.stem}
            if names & SKIPPED or any(h in (n.strip("_"), n) for n in names for h in DEMO_MODULES):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if text not in seen and "\ufffd" not in text and is_prose(text):
                seen.add(text)
                yield kind, text


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """The file of a Llama-style sentencepiece BPE with byte fallback; newlines are own pieces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=file,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        input_sentence_size=400_000,
        shuffle_input_sentence=True,
        minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


def token_stream(texts: list[str], tokenizer, seed: int) -> Tensor:
    """All texts in random order as one int64 stream, each between BOS and EOS."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    ids = []
    for text in texts:
        ids += [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
    return torch.tensor(ids)


def paste_passage(window: Tensor, rng: random.Random) -> None:
    """Repeat a random passage of the window further on, in place."""
    n = rng.randint(16, len(window) // 8)
    source = rng.randint(0, len(window) - 2 * n)
    target = rng.randint(source + n, len(window) - n)
    window[target : target + n] = window[source : source + n].clone()


def batches(stream: Tensor, phase: Phase, seed: int) -> Iterator[Tensor]:
    """[B, context + 1] windows in random order, a third of them with a pasted passage."""
    rng = random.Random(seed)
    rows = max(TOKENS_PER_STEP // phase.context, 1)
    todo: list[int] = []
    for _ in range(phase.tokens // (rows * phase.context)):
        if len(todo) < rows:
            offset = rng.randrange(phase.context)
            todo = list(range(offset, len(stream) - phase.context - 1, phase.context))
            rng.shuffle(todo)
        batch = torch.stack([stream[i : i + phase.context + 1] for i in todo[:rows]])
        del todo[:rows]
        for window in batch:
            if rng.random() < 1 / 3:
                paste_passage(window, rng)
        yield batch


def batch_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats of [B, T + 1] tokens."""
    tokens, target = batch[:, :-1], batch[:, 1:]
    pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens, pos)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


@torch.no_grad()
def held_out_loss(model: Transformer, tokenizer, context: int, device: str) -> float:
    """Mean loss in nats on the first `context` tokens of the held-out modules that have more."""
    rows = []
    for name in DEMO_MODULES:
        ids = [tokenizer.bos_id(), *tokenizer.encode(module_source(name))]
        if len(ids) > context:
            rows.append(torch.tensor(ids[: context + 1], device=device))
    return sum(batch_loss(model, row[None]).item() for row in rows) / len(rows)


def init_weights(model: Transformer) -> None:
    """Normal(0, 0.02), the projections back into the residual stream smaller by sqrt(2 L)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("wo.weight", "w_down.weight"))
            scale = math.sqrt(2 * model.config.n_layer) if residual else 1.0
            torch.nn.init.normal_(p, std=0.02 / scale)


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(done: float) -> float:
    """Share of the peak rate after a share `done` of the run: warm-up, flat, then down to zero."""
    return min(done / 0.02, 1.0, (1 - done) / 0.5)


def save_checkpoint(model: Transformer, tokenizer: bytes, out: Path, history: list[dict]) -> None:
    """Write the Hugging Face directory, bfloat16, and the training record beside it."""
    out.mkdir(parents=True, exist_ok=True)
    eager = Transformer(model.config)
    eager.load_state_dict(model.state_dict())
    save_model(eager.to(torch.bfloat16), out, bos_token_id=1, eos_token_id=2)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    write_json(generation, out / "generation_config.json")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(TOKENIZER_CONFIG | tokens, out / "tokenizer_config.json")
    record = {"phases": [asdict(p) for p in PHASES], "torch": torch.__version__}
    write_json(record | {"history": history}, out / "training.json")
    (out / "tokenizer.model").write_bytes(tokenizer)


def train(config: ModelConfig, out: Path, device: str, seed: int) -> None:
    """The whole run: data, tokenizer, phases; saves at the end of every phase."""
    torch.manual_seed(seed)
    files = list(sources())
    stdlib = [t for kind, t in files if kind == "stdlib"]
    other = [t for kind, t in files if kind == "package"]
    tokenizer_file = train_tokenizer(stdlib * 2 + other, config.vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_file)
    stream = token_stream(stdlib * 4 + other, tokenizer, seed).to(device)
    print(
        f"{len(files)} files, {len(stream) / 1e6:.1f}M tokens (standard library four times)",
        flush=True,
    )

    model = Transformer(config).to(device)
    init_weights(model)
    compile_blocks(model)
    opts = optimizers(model)
    peak = [[g["lr"] for g in opt.param_groups] for opt in opts]
    total, seen, start, history = sum(p.tokens for p in PHASES), 0, time.time(), []
    for phase in PHASES:
        for step, batch in enumerate(batches(stream, phase, seed)):
            for opt, rates in zip(opts, peak, strict=True):
                for group, rate in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = rate * learning_rate((seen + 1) / total)
            loss = batch_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            seen += batch[:, 1:].numel()
            if step % 20 == 0:
                rate = seen / (time.time() - start)
                print(f"{seen / 1e6:6.2f}M  loss {loss.item():.3f}  {rate:.0f} tok/s", flush=True)
            if step % 200 == 199:
                record(model, tokenizer, seen, loss.item(), start, phase, device, history)
        record(model, tokenizer, seen, loss.item(), start, phase, device, history)
        save_checkpoint(model, tokenizer_file, out, history)


def record(model, tokenizer, seen, loss, start, phase, device, history) -> None:
    """Append held-out loss at 512 tokens and at the phase's context to the history."""
    at = {c: held_out_loss(model, tokenizer, c, device) for c in sorted({512, phase.context})}
    history.append(
        {"tokens": seen, "seconds": round(time.time() - start), "context": phase.context,
             "train_loss": round(loss, 4), "held_out_loss": {c: round(v, 4) for c, v in at.items()}}
    )  # fmt: skip
    print(history[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(DEMO, args.out, args.device, args.seed)


if __name__ == "__main__":
    main()
