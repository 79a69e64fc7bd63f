"""All that a command needs before it runs, the cheap things first: the weights come last.

`open_all` reads what is small. Then the command reads its prompts, and knows how many rows of which
length it needs. `make_engine` checks what that takes, loads the weights and makes the engine, with
the strategies that the flags allow. So whatever is wrong is said before anything large is made.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

import prompts
from auto import Auto, Candidate
from batch import MAX_EOS
from checkpoint import DTYPES, KV_DTYPES, Checkpoint, open_checkpoint
from config import ModelConfig, kv_bytes
from device import check_fits, dtype_name, find_device
from drafters import check_strategy, with_weights
from kernels import compile_blocks, compiler_runs
from measure import Job, Progress
from model import Transformer
from options import Options
from parallel import Shard, check_same, shard_of
from policies import POLICIES, Strategy
from quantize import emulated, resolve
from roofline import Workload, draft_lengths, preset, whole_is_faster
from sampling import Sampling, widest
from spec_decode import Engine

LARGE = 10**9  # bytes of weights from which loading is worth a line


class Opened(NamedTuple):
    """What is known before prompts and weights are read."""

    checkpoint: Checkpoint
    draft: Checkpoint | None  # of a draft model of its own
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the target's K and V
    end_ids: tuple[int, ...]  # tokens that end a text
    max_context: int  # tokens of prompt and answer
    shard: Shard | None = None  # what this rank has of the model; None: all of it

    @property
    def config(self) -> ModelConfig:
        """Of what this rank has."""
        return self.shard.config if self.shard else self.checkpoint.config


def open_all(o: Options) -> Opened:
    """Read checkpoints without their weights. OSError or ValueError if they cannot be used."""
    device, draft = find_device(o.device), None
    dtype = DTYPES[o.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    kv_dtype = KV_DTYPES[o.kv_dtype] if o.kv_dtype else dtype
    if kv_dtype.itemsize == 1 and device.type != "cuda":
        raise ValueError("--kv_dtype float8 needs a GPU; on a CPU use --kv_dtype bfloat16")
    checkpoint = open_checkpoint(o.checkpoint_path, o.chat)
    end_ids = () if o.ignore_eos else checkpoint.end_ids(MAX_EOS)
    if o.draft_checkpoint_path:
        draft = open_checkpoint(o.draft_checkpoint_path)
        checkpoint.check_same_vocabulary(draft)
    max_context = checkpoint.config.max_seq_len
    max_context = min(max_context, o.max_context or max_context)
    shard = shard_of(checkpoint.config)
    return Opened(checkpoint, draft, device, dtype, kv_dtype, end_ids, max_context, shard)


def check_size(opened: Opened, n_rows: int, n_tokens: int) -> None:
    """ValueError if the caches alone do not fit; the engine asks again, for all that it needs."""
    n_bytes = n_rows * kv_bytes(opened.config, n_tokens, opened.kv_dtype.itemsize)
    remedy = "a smaller --batch_size or --max_context"
    check_fits(n_bytes, opened.device, "the KV caches", lambda share: remedy)


def load(o: Options) -> tuple[Checkpoint, Engine, Auto | None, Job]:
    """Everything for one batch. OSError or ValueError for what cannot be used."""
    samplings, opened = o.samplings, open_all(o)
    longest = opened.max_context
    check_size(opened, o.batch_size or 1, min(1 + o.max_new_tokens, longest))  # rows are large too
    rows = read_rows(o, opened.checkpoint, longest)
    check_same("the prompts", rows)
    if not o.interactive:
        longest = max(map(len, rows)) + o.max_new_tokens
    engine, auto = make_engine(o, opened, len(rows), longest, widest(samplings))
    job = Job(rows, o.max_new_tokens, opened.end_ids, o.compares, samplings[0])
    return opened.checkpoint, engine, auto, job


def make_engine(
    o: Options,
    opened: Opened,
    n_rows: int,
    longest: int,  # tokens of a row, prompt and answer together
    sampling: Sampling,  # the widest of all rows
) -> tuple[Engine, Auto | None]:
    """Load the weights and make an engine, with what decides how to draft if anything is left.

    ValueError for what does not fit into memory, or does not go together.
    """
    checkpoint, draft, device, dtype, kv_dtype, *_ = opened
    check_size(opened, n_rows, longest)
    automatic = o.drafts and "auto" in (o.draft, o.speculate_k)
    lengths = draft_lengths(device.type, opened.config.n_group)
    gammas = o.gammas(lengths[:-1] if o.exact else lengths)  # all rounds would pay for the longest
    strategies = weighed(o, opened, o.strategies(max(gammas)))
    if len(strategies) == 1:
        check_strategy(strategies[0], draft.config if draft else None, longest)
    wanted = o.compile and not o.explain
    compiling = wanted and compiler_runs(device)
    if wanted and not compiling:
        print("generate.py: no working compiler for torch.compile on this machine (the CPU needs "
              "g++): running eagerly, which is slower", file=sys.stderr)  # fmt: skip
    if any(emulated(d.weights, opened.config, device) for d in strategies):
        print(f"generate.py: {o.draft_weights} draft weights have no kernel here: they are "
              "emulated, which is no faster", file=sys.stderr)  # fmt: skip
    model = load_weights(checkpoint, opened, compiling, opened.shard)
    model.kv_dtype, model.exact = kv_dtype, max(gammas) if o.exact else 0
    draft_model = None
    if draft:
        own = strategies[-1]
        reads = min(own.budget, longest) if own.policy in POLICIES else longest
        whole = partial(had_better_be_whole, opened, draft.config, n_rows, reads)
        draft_model = load_weights(draft, opened, compiling, shard_of(draft.config, whole))
    if not automatic:
        return Engine(model, n_rows, longest, strategies[0], sampling, o.seed, draft_model), None
    engine = Engine(model, n_rows, longest, Strategy(), sampling, o.seed)
    named = o.draft != "auto"
    candidates = [Candidate(d) for d in strategies if not (draft_model and named)]
    if draft_model:
        own = replace(strategies[-1], weights="same")
        own = own if named else replace(own, policy="streaming", reselect_every=None)
        candidates.append(Candidate(own, draft_model))
    return engine, Auto(engine, candidates, gammas, named)


def had_better_be_whole(
    opened: Opened, draft: ModelConfig, n_rows: int, n_read: int, n_ranks: int
) -> bool:
    """Whether each rank had better have all of a draft model, by the cost model's presets."""
    w = Workload(n_rows, n_read, n_ranks, opened.dtype.itemsize)
    return whole_is_faster(draft, preset(opened.device.type), w, n_read)


def weighed(o: Options, opened: Opened, strategies: list[Strategy]) -> list[Strategy]:
    """The same with the draft weights that were asked for, or the automatic ones where they serve.

    ValueError for bfloat16 beside bfloat16.
    """
    kind = resolve(o.draft_weights, opened.config, opened.device, opened.dtype)
    if o.lower_weights and len(strategies) == 1:
        return [replace(strategies[0], weights=kind)]  # refused later if it has no use for them
    own_model = opened.draft is not None and o.draft != "auto"
    return [with_weights(d, kind, own_model) for d in strategies]


def read_rows(o: Options, checkpoint: Checkpoint, max_context: int) -> list[list[int]]:
    """Token ids of every row; with --interactive, which has no prompts yet, empty ones."""
    longest, tokenizer = prompts.longest_prompt(max_context, o.max_new_tokens), checkpoint.tokenizer
    if o.interactive:
        return [[]] * (o.batch_size or 1)
    if not o.n_sources:
        n_rows = o.batch_size or (1 if o.explain else prompts.DEMO_ROWS)
        return prompts.demo_prompts(tokenizer, n_rows, min(prompts.DEMO_LONGEST, longest))
    encode = partial(checkpoint.encode, system=o.system)
    given = prompts.read_prompts(o.prompt, o.prompt_file, o.prompts, encode)
    prompts.check_lengths(given, max_context, o.max_new_tokens)
    return prompts.fill_rows(given, o.batch_size or len(given), tokenizer.vocab_size, o.seed)


def load_weights(
    checkpoint: Checkpoint, opened: Opened, compiling: bool, shard: Shard | None
) -> Transformer:
    """The model; of a large one, standard error tells how far it is."""
    say = partial(print, file=sys.stderr, flush=True)
    progress = Progress(say)

    def on_tensor(done: int, total: int) -> None:
        if total >= LARGE:
            if not done:
                say(f"loading {checkpoint.path}: {total / 1e9:.1f} GB", end=" ... ")
            progress(done, total)
            if done == total:
                say()

    model = checkpoint.load(opened.device, opened.dtype, on_tensor, shard)
    if compiling:
        compile_blocks(model)
    return model


def describe(o: Options, engine: Engine, auto: Auto | None, what: str) -> str:
    """What is about to run, in three lines; the middle one says what is decoded."""
    n_params = sum(p.numel() for p in engine.model.parameters())
    dtype, kv_dtype = (
        dtype_name(t) for t in (engine.full.spec.dtype, engine.full.spec.stored_dtype)
    )
    dtype += f" (KV {kv_dtype})" if kv_dtype != dtype else ""
    n_ranks = engine.model.config.n_ranks
    share = f" on each of {n_ranks} ranks" if n_ranks > 1 else ""
    draft = "no draft: plain decoding"
    if auto:
        candidates = ", ".join(map(str, auto.candidates))
        draft = f"auto: {candidates}; gamma of {', '.join(map(str, auto.gammas))}"
        draft += "" if auto.named else ", or no draft"
    elif engine.drafter:
        label = engine.drafter.label(f"draft model {o.draft_checkpoint_path}")
        draft = f"{label}, gamma {engine.gamma}"
    if o.exact:
        draft += f"; exact: every step of the target is of {engine.full.spec.exact + 1} tokens"
    return (
        f"{o.checkpoint_path}: {n_params / 1e6:.1f}M parameters{share}, {dtype} on {o.device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{what}\n{draft}"
    )


def how(sampling: Sampling) -> str:
    """How tokens are picked, in words."""
    if sampling.greedy:
        return "greedy"
    cuts = {"top_k": sampling.top_k, "top_p": sampling.top_p}
    told = [f"{name} {value}" for name, value in cuts.items() if value is not None]
    return ", ".join([f"temperature {sampling.temperature}", *told])
