"""Train the demo checkpoints again, from Python source that is already on the machine.

  python scripts/train_demo.py demo --out checkpoints/demo
  python scripts/train_demo.py demo-draft --out checkpoints/demo-draft --tokenizer checkpoints/demo

The data is what every machine with the requirements installed has: the standard library and the
sources of the installed packages, without tests, generated tables and vendored copies. Twenty
well-known standard modules (DEMO_MODULES) are never trained on, nor is any file of the same name:
the demo's prompts are cut from them. The model is written as a Hugging Face Llama directory.

Context starts short and is lengthened: most of what a small model learns needs 512 tokens, and
long windows cost attention time. In a third of the windows a passage is pasted again further on.
That alone does not teach copying from thousands of tokens back, so the last phases of the demo
model fill the second half of every other window with passages of what came before: that is what a
long context is for, and what a sparse draft cache can lose. `demo-draft`, a tenth of the size, is
for drafting; it never sees more than 512 tokens. Matrices are optimised by Muon, the rest by AdamW.
"""

import argparse
import io
import json
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import load_model
from config import ModelConfig
from files import write_json
from kernels import compile_blocks
from model import Transformer, rope_frequencies
from prompts import DEMO_MODULES, module_source
from scripts.save_model import save_model

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
    rate: tuple[float, float]  # share of the peak learning rate at its start and end, linear
    recall: float = 0.0  # share of the windows whose second half repeats the text before it
    rope_theta: float | None = None  # change it to this before the phase


@dataclass(frozen=True, slots=True)
class Recipe:
    config: ModelConfig
    phases: tuple[Phase, ...]


TOKENS_PER_STEP = 8192
TOKENIZER_CONFIG = {  # with which transformers reads tokenizer.model as we do
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}
DEMO = Recipe(
    ModelConfig(
        dim=256, n_layer=6, n_head=4, n_kv_head=4, head_dim=128, ffn_dim=704, vocab_size=4096,
        max_seq_len=4096, rope_theta=100_000.0, norm_eps=1e-5, tie_embeddings=True,
    ),
    (
        Phase(512, 6_250_000, (1.0, 1.0)), Phase(512, 750_000, (1.0, 0.88)),
        Phase(2048, 3_500_000, (0.88, 0.32)), Phase(4096, 2_000_000, (0.32, 0.0)),
        Phase(2048, 2_500_000, (0.3, 0.2), recall=0.5),
        Phase(4096, 4_500_000, (0.2, 0.0), recall=0.5),
        Phase(4096, 1_500_000, (0.2, 0.0), recall=0.5, rope_theta=300_000.0),
        Phase(512, 4_000_000, (0.7, 0.7), recall=0.1),
        Phase(512, 4_000_000, (0.7, 0.7), recall=0.1),
        Phase(512, 3_000_000, (0.7, 0.4), recall=0.1),
        Phase(4096, 2_500_000, (0.4, 0.0), recall=0.3),
    ),
)  # fmt: skip
DEMO_DRAFT = Recipe(
    ModelConfig(
        dim=96, n_layer=3, n_head=2, n_kv_head=1, head_dim=64, ffn_dim=256, vocab_size=4096,
        max_seq_len=512, rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True,
    ),
    (Phase(512, 3_000_000, (1.0, 1.0)), Phase(512, 3_000_000, (1.0, 0.0))),
)  # fmt: skip
RECIPES = {"demo": DEMO, "demo-draft": DEMO_DRAFT}
WARM_UP = 200_000  # tokens over which the learning rate first rises
EXPLICIT = 512  # context up to which products and a softmax beat fused attention on a CPU


def is_prose(text: str) -> bool:
    """False for generated tables: few letters, or very long lines."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    lines = text.count("\n") + 1
    return len(text) > 200 and letters > 0.7 * len(text) and len(text) < 100 * lines


def is_written(text: str, seen: set[str]) -> bool:
    """False for what a program wrote, repeats itself, or is mostly a copy of what was seen.

    Lines are compared without their indentation; those of the text join the seen ones.
    """
    lines = [line for line in map(str.strip, text.split("\n")) if len(line) > 15]
    new = set(lines) - seen
    seen |= new
    generated = re.search(r"generated (file|by|with|from)|do not (manually )?(edit|modify)",
                          text[:600], re.IGNORECASE)  # fmt: skip
    return not generated and len(set(lines)) > 0.4 * len(lines) and 2 * len(new) > len(set(lines))


def sources() -> Iterator[tuple[str, str]]:
    """(kind, text) of every training file, kind "stdlib" or "package", each text once."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    site = Path(torch.__file__).resolve().parents[1]
    seen: set[str] = set()  # lines
    for kind, root in [("stdlib", stdlib), *(("package", site / p) for p in PACKAGES)]:
        for path in sorted(root.rglob("*.py")):
            names = set(path.relative_to(root).parts[:-1]) | {path.stem}
            if names & SKIPPED or any(h in (n.strip("_"), n) for n in names for h in DEMO_MODULES):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if "\ufffd" not in text and is_prose(text) and is_written(text, seen):
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


def fill_with_recall(window: Tensor, rng: random.Random) -> None:
    """Make the second half of the window mostly passages of the text before them, in place.

    Half of the time some of what can be repeated is random tokens: these can only be copied.
    """
    for _ in range(rng.choice((0, 4))):
        n, start = rng.randint(32, 128), rng.randrange(len(window) // 2 - 128)
        window[start : start + n] = torch.tensor([rng.randrange(259, 4096) for _ in range(n)])
    target = len(window) // 2
    while target < len(window):
        n = min(rng.randint(32, 384), len(window) - target, target)
        source = rng.randint(0, target - n)
        window[target : target + n] = window[source : source + n].clone()
        target += n + rng.randint(0, 96)


def batches(stream: Tensor, phase: Phase, seed: int) -> Iterator[Tensor]:
    """[B, context + 1] windows in random order, some of them with repeated passages."""
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
            if rng.random() < phase.recall:
                fill_with_recall(window, rng)
            elif rng.random() < 1 / 3:
                paste_passage(window, rng)
        yield batch


def batch_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats of [B, T + 1] tokens."""
    tokens, target = batch[:, :-1], batch[:, 1:]
    pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    kind = SDPBackend.MATH if tokens.shape[1] <= EXPLICIT else SDPBackend.FLASH_ATTENTION
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16), sdpa_kernel(kind):
        logits = model(tokens, pos)
    return cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.compile(dynamic=False)
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:  # [N, V], [N] -> []
    """Mean in nats, in one pass over the logits: eagerly it takes four times as long."""
    return F.cross_entropy(logits.float(), target)


@torch.no_grad()
def held_out_loss(model: Transformer, tokenizer, context: int, device: str) -> float:
    """Mean loss in nats on the first `context` tokens of the held-out modules that have more."""
    rows = []
    for name in DEMO_MODULES:
        ids = [tokenizer.bos_id(), *tokenizer.encode(module_source(name))]
        if len(ids) > context:
            rows.append(torch.tensor(ids[: context + 1], device=device))
    return sum(batch_loss(model, row[None]).item() for row in rows) / len(rows)


@torch.no_grad()
def recall_accuracy(model: Transformer, tokenizer, context: int, device: str) -> float:
    """Share of next tokens right in a passage that repeats one from 3/4 of the context before."""
    n, right = context // 16, []
    for name in DEMO_MODULES:
        ids = [tokenizer.bos_id(), *tokenizer.encode(module_source(name))][:context]
        if len(ids) == context:
            row = torch.tensor(ids, device=device)
            row[-n:] = row[context // 4 - n : context // 4]
            pos = torch.arange(context, device=device)[None]
            with torch.autocast(device, dtype=torch.bfloat16):
                guess = model(row[None], pos)[0, -n:-1].argmax(dim=-1)
            right.append((guess == row[-n + 1 :]).float().mean().item())
    return sum(right) / len(right)


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


def save_checkpoint(
    model: Transformer, phases: tuple[Phase, ...], tokenizer: bytes, out: Path, history: list[dict]
) -> None:
    """Write the Hugging Face directory, bfloat16, and the training record beside it."""
    out.mkdir(parents=True, exist_ok=True)
    eager = Transformer(model.config)
    eager.load_state_dict(model.state_dict())
    save_model(eager.to(torch.bfloat16), out, bos_token_id=1, eos_token_id=2)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    write_json(generation, out / "generation_config.json")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(TOKENIZER_CONFIG | tokens, out / "tokenizer_config.json")
    record = {"phases": [asdict(p) for p in phases], "torch": torch.__version__}
    write_json(record | {"history": history}, out / "training.json")
    (out / "tokenizer.model").write_bytes(tokenizer)


def train(
    recipe: Recipe,
    out: Path,
    device: str,
    seed: int,
    tokenizer_dir: Path | None,  # use its tokenizer; None: train one
    start: int,  # index of the first phase to run; above 0 it goes on from the weights in `out`
) -> None:
    """The whole run: data, tokenizer, phases; saves at the end of every phase."""
    torch.manual_seed(seed)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of the CPU, too
    files = list(sources())
    stdlib = [t for kind, t in files if kind == "stdlib"]
    other = [t for kind, t in files if kind == "package"]
    if tokenizer_dir is None:
        tokenizer_file = train_tokenizer(stdlib * 2 + other, recipe.config.vocab_size)
    else:
        tokenizer_file = (tokenizer_dir / "tokenizer.model").read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_file)
    stream = token_stream(stdlib * 4 + other, tokenizer, seed).to(device)
    print(
        f"{len(files)} files, {len(stream) / 1e6:.1f}M tokens (standard library four times)",
        flush=True,
    )

    if start:
        model = load_model(out, torch.device(device), torch.float32).train().requires_grad_(True)
        history = json.loads((out / "training.json").read_text())["history"]
    else:
        model, history = Transformer(recipe.config).to(device), []
        init_weights(model)
    compile_blocks(model)
    opts = optimizers(model)
    peak = [[g["lr"] for g in opt.param_groups] for opt in opts]
    seen, begin = 0, time.time()
    before = sum(p.tokens for p in recipe.phases[:start])
    for index, phase in list(enumerate(recipe.phases))[start:]:
        done = 0
        if phase.rope_theta:
            model.config = replace(model.config, rope_theta=phase.rope_theta)
            model.rope_freq.copy_(rope_frequencies(model.config))
        for step, batch in enumerate(batches(stream, phase, seed + index)):
            first, last = phase.rate
            rate = first + (last - first) * done / phase.tokens
            rate *= min((seen + TOKENS_PER_STEP) / WARM_UP, 1.0)
            for opt, rates in zip(opts, peak, strict=True):
                for group, r in zip(opt.param_groups, rates, strict=True):
                    group["lr"] = r * rate
            loss = batch_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            done += batch[:, 1:].numel()
            seen += batch[:, 1:].numel()
            if step % 20 == 0:
                speed = seen / (time.time() - begin)
                now = (before + seen) / 1e6
                print(f"{now:6.2f}M  loss {loss.item():.3f}  {speed:.0f} tok/s", flush=True)
            if step % 200 == 199:
                history.append(measure(model, tokenizer, before + seen, loss, phase, device))
        history.append(measure(model, tokenizer, before + seen, loss, phase, device))
        save_checkpoint(model, recipe.phases, tokenizer_file, out, history)


def measure(model, tokenizer, tokens: int, loss: Tensor, phase: Phase, device: str) -> dict:
    """Held-out loss at 512 tokens and at the phase's context, and recall at the latter."""
    contexts = sorted({512, phase.context})
    at = {c: round(held_out_loss(model, tokenizer, c, device), 4) for c in contexts}
    recall = round(recall_accuracy(model, tokenizer, phase.context, device), 3)
    entry = {"tokens": tokens, "context": phase.context, "train_loss": round(loss.item(), 4)}
    entry |= {"held_out_loss": at, "recall_accuracy": recall}
    print(entry, flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="directory to take tokenizer.model from")
    parser.add_argument("--start", type=int, default=0, help="go on in --out with this phase")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = args.out if args.start else args.tokenizer
    train(RECIPES[args.recipe], args.out, args.device, args.seed, tokenizer, args.start)


if __name__ == "__main__":
    main()
