"""The command line: prompts in, text and numbers out.

    python generate.py                        # the demo: 16 long prompts, plain and speculative
    python generate.py --checkpoint_path DIR --prompt_file book.txt --max_new_tokens 512 --compare

A run loads the model, reads the prompts, compiles, prefills, and decodes: once with the chosen
draft, and with `--compare` once more plainly, in the same process with the same caches and compiled
blocks, from the same prefill. It ends with a table. Timing lives here: the engine has none.

* compile and prefill are never part of decode tokens/s; a row's first token belongs to the prefill.
* `T_T`, `T_D`, `T_V` are medians of repeated single steps from the state after the prefill.
* acceptance figures have vLLM's definitions (`spec_decode.Stats`).

What a user can get wrong ends in one line on standard error and exit status 2.
"""

import argparse
import importlib.util
import io
import json
import platform
import resource
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
import torch

from auto import GAMMAS, Auto, Candidate, timed
from cost_model import Parser
from drafters import NGRAM, Drafting, ModelDrafter, check_drafting
from kv_cache import POLICIES
from model import (
    ModelConfig,
    compile_blocks,
    compiler_runs,
    eos_token_ids,
    load_config,
    load_model,
    write_json,
)
from spec_decode import Engine, Sampling, Stats, decode
from tokenizer import TextStream, Tokenizer, continuation, load_tokenizer

DEMO_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "demo"
DEMO_MODULES = (  # standard modules that the demo checkpoint was not trained on
    "shutil", "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum",
    "inspect", "ipaddress", "logging", "optparse", "pdb", "pickle", "statistics", "subprocess",
    "tarfile", "threading", "typing", "zipfile",
)  # fmt: skip
AUTO_POLICIES = ("ngram", "streaming", "snapkv")  # what --draft auto chooses from
DEMO_ROWS, DEMO_SHORTEST, DEMO_LONGEST = 16, 3000, 3840  # rows, tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Run:
    """One timed decoding of the batch."""

    stats: Stats
    outputs: list[list[int]]
    seconds: float  # decoding alone

    @property
    def tokens_per_second(self) -> float:
        return self.stats.decoded_tokens / self.seconds

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from a token to the next one of its row, while the row runs."""
        ms_per_round = 1e3 * self.seconds / max(self.stats.rounds, 1)
        return ms_per_round * self.stats.row_rounds / max(self.stats.decoded_tokens, 1)


@dataclass(slots=True)
class Report:
    """Everything that the table and the JSON show."""

    engine: Engine
    prompts: list[list[int]]
    compile_seconds: float
    prefill_seconds: float
    step_ms: dict[str, float]  # target_step_ms, and when drafting draft_step_ms, verify_ms
    main: Run
    baseline: Run | None  # plain decoding, with --compare
    auto: Auto | None  # what decided, if anything did

    @property
    def speedup(self) -> float | None:
        """Over the baseline; None without one, or when the prefill already decided everything."""
        if self.baseline is None or not self.main.stats.decoded_tokens:
            return None
        return self.main.tokens_per_second / self.baseline.tokens_per_second

    @property
    def gamma(self) -> int:
        """Draft tokens per round, where it was chosen the first choice; 0: none."""
        return self.auto.gamma if self.auto else self.engine.gamma

    @property
    def synthetic(self) -> float | None:
        return self.engine.drafting.synthetic_acceptance

    @property
    def identical(self) -> list[bool] | None:
        """Per row: the same tokens as the baseline; None where they need not be the same."""
        if self.baseline is None or not self.engine.sampling.greedy or self.synthetic is not None:
            return None
        pairs = zip(self.main.outputs, self.baseline.outputs, strict=True)
        return [ours == theirs for ours, theirs in pairs]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--checkpoint_path", type=Path, default=DEMO_CHECKPOINT, help="Hugging Face directory"
    )
    p.add_argument(
        "--draft_checkpoint_path", type=Path, help="draft with this smaller model of its own"
    )
    p.add_argument(
        "--prompt", action="append", default=[], help="text; an integer N: N random tokens"
    )
    p.add_argument(
        "--prompt_file", action="append", default=[], type=Path, help="UTF-8 text (repeatable)"
    )
    p.add_argument("--prompts", type=Path, help='.jsonl, an object with "prompt" per line')
    p.add_argument("--batch_size", type=int, help="rows; prompts are repeated to fill them")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=Sampling().temperature, help="0: greedy")
    p.add_argument("--top_k", type=int)
    p.add_argument("--top_p", type=float)
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--ignore_eos", action="store_true", help="go on to the limit")
    p.add_argument("--draft", default="auto",
                   help=f"how to draft: auto, none, ngram, {', '.join(POLICIES)}; "
                        "with --draft_checkpoint_path also full")  # fmt: skip
    p.add_argument("--speculate_k", "--gamma", type=int_or_auto, default="auto", metavar="N|auto",
                   help="draft tokens per round; 0: plain decoding")  # fmt: skip
    p.add_argument("--draft_budget", type=int, default=Drafting().budget,
                   help="tokens of KV that the draft reads per row, sinks included")  # fmt: skip
    p.add_argument("--n_sink", type=int, default=Drafting().n_sink)
    p.add_argument("--obs_window", type=int, default=Drafting().obs_window,
                   help="newest tokens whose queries snapkv observes")  # fmt: skip
    p.add_argument("--reselect_every", type=int, metavar="ROUNDS",
                   help="how often to select the draft's KV again; 0: never")  # fmt: skip
    p.add_argument("--synthetic_acceptance", type=float, metavar="RATE",
                   help="benchmarks: draw the accepted count at this rate")  # fmt: skip
    p.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, help="run plain decoding too"
    )
    p.add_argument(
        "--check_lossless", action="store_true", help="compare, and exit 1 on a difference"
    )
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    p.add_argument(
        "--profile", type=Path, metavar="FILE", help="write a Chrome trace of the decoding"
    )
    p.add_argument("--interactive", action="store_true", help="read prompts from standard input")
    p.add_argument(
        "--json", metavar="FILE", help="write the numbers and outputs; -: standard output"
    )
    args = p.parse_args(argv)
    check_args(args)
    return args


def int_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check_args(args: argparse.Namespace) -> None:
    """ValueError for values and combinations that make no sense; fills in dependent defaults."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size} must be at least 1")
    given = sum(map(bool, (args.prompt, args.prompt_file, args.prompts, args.interactive)))
    if given > 1:
        raise ValueError("give one of --prompt, --prompt_file, --prompts and --interactive")
    drafts = args.draft != "none" and args.speculate_k != 0
    if args.compare is None:
        args.compare = args.check_lossless or (drafts and not given)
    for flag in ("compare", "check_lossless", "synthetic_acceptance"):
        if getattr(args, flag) not in (None, False) and not drafts:
            raise ValueError(f"--{flag} needs a draft: not --draft none, not --speculate_k 0")
    if args.interactive and (args.compare or args.json or args.profile):
        raise ValueError("--interactive has no --compare, --check_lossless, --json or --profile")
    if args.check_lossless and (args.temperature > 0 or args.synthetic_acceptance is not None):
        raise ValueError(
            "--check_lossless compares greedy outputs: no --temperature, no --synthetic_acceptance"
        )
    if args.check_lossless and not args.compare:
        raise ValueError("--check_lossless needs the plain run that --no-compare leaves out")
    for path in (args.json if args.json != "-" else None, args.profile):
        if path and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise ValueError(f"cannot write {path}: its directory must exist, and it be a file")
    if args.draft_checkpoint_path and not drafts:
        raise ValueError("--draft_checkpoint_path needs a draft: not --draft none, --speculate_k 0")
    if args.synthetic_acceptance is not None and "auto" in (args.draft, args.speculate_k):
        raise ValueError("--synthetic_acceptance needs a --draft and a --speculate_k, not auto")
    args.device = check_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")


def check_device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def module_source(name: str) -> str:
    """Source text of a top-level standard module, found without importing it."""
    return Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")


def demo_lengths(n_rows: int, longest: int = DEMO_LONGEST) -> list[int]:
    """Different prompt lengths of at most `longest` tokens.

    Long and short rows alternate: threads share the rows of a batch in contiguous parts.
    """
    shortest = longest * DEMO_SHORTEST // DEMO_LONGEST
    ranks = [n_rows - 1 - row // 2 if row % 2 else row // 2 for row in range(n_rows)]
    lengths = [shortest + (longest - shortest) * rank // max(n_rows - 1, 1) for rank in ranks]
    return [max(length, 1) for length in lengths]


def demo_prompts(tokenizer: Tokenizer, n_rows: int, longest: int) -> list[list[int]]:
    """Beginnings of standard modules, cut to the demo's lengths."""
    names = [DEMO_MODULES[row % len(DEMO_MODULES)] for row in range(n_rows)]
    lengths = demo_lengths(n_rows, longest)
    return [
        tokenizer.encode(module_source(name))[:length]
        for name, length in zip(names, lengths, strict=True)
    ]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None


def read_jsonl(path: Path) -> list[str]:
    """The prompts of a file with a JSON object per line; ValueError names a line that is not."""
    texts = []
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        try:
            texts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            texts.append(None)
        if not isinstance(texts[-1], str):
            raise ValueError(f'{path}, line {number}: not an object with a text "prompt"')
    return texts


def encode_prompt(text: str, args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt; a --prompt that is an integer N stands for N random tokens."""
    if not args.prompt or not text.isdecimal():
        return tokenizer.encode(text) if text else []
    n = int(text) if len(text) < 10 else 10**9
    if n > 10**7:
        raise ValueError(f"--prompt {text}: a synthetic prompt of so many tokens fits no model")
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(tokenizer.vocab_size, (n,), generator=generator).tolist()


def read_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer, max_context: int
) -> list[list[int]]:
    """Token ids of every row of the batch; with --interactive, which has none yet, empty ones."""
    longest = max_context - args.max_new_tokens  # prompt tokens that leave room for the answer
    if longest < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} does not fit into the model's "
            f"context of {max_context} tokens"
        )
    if args.interactive:
        return [[]] * (args.batch_size or 1)
    if not (args.prompt or args.prompt_file or args.prompts):
        return demo_prompts(tokenizer, args.batch_size or DEMO_ROWS, min(DEMO_LONGEST, longest))
    texts = read_jsonl(args.prompts) if args.prompts else args.prompt
    texts = texts + [read_text(path) for path in args.prompt_file]
    prompts = [encode_prompt(text, args, tokenizer) for text in texts]
    for number, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {number} is empty; nothing can follow from it")
        if len(ids) > longest:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens; the model's context of {max_context} "
                f"leaves room for {longest} with --max_new_tokens {args.max_new_tokens}"
            )
    n_rows = args.batch_size or len(prompts)
    if n_rows < len(prompts):
        raise ValueError(f"--batch_size {n_rows} is less than the {len(prompts)} prompts given")
    return [prompts[row % len(prompts)] for row in range(n_rows)]


def decoder(engine: Engine, auto: Auto | None) -> Callable[[Callable[[], None]], Stats]:
    """What decodes the batch: the automatic choice, or the drafting that was asked for."""
    return auto.decode if auto else lambda on_round: decode(engine, on_round=on_round)


def warm_up(engine: Engine, auto: Auto | None = None) -> None:
    """Compile every shape that will run, twice each; decides no tokens."""
    for _ in range(2):
        engine.prefill_row(0, 1)
        if engine.drafter:
            engine.drafter.prefill(0, 1)
            engine.drafter.select()
        for gamma in {0, engine.gamma}:
            engine.verify(engine.draft(gamma).tokens)
    if auto:
        auto.prepare()


def step_times(
    engine: Engine, repeats: int = 9, gamma: int | None = None, **more: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds, by repeat, of a plain step, a draft step, a verification, and of more work.

    They are taken in turn, so that all see the same machine.
    """
    gamma, nothing = engine.gamma if gamma is None else gamma, engine.draft(0).tokens
    tokens = engine.draft(gamma).tokens
    work = more | {"target_step_ms": lambda: engine.verify(nothing).argmax(dim=-1)}
    if gamma:
        work["draft_step_ms"] = lambda: engine.draft(gamma)
        work["verify_ms"] = lambda: engine.verify(tokens).argmax(dim=-1)
    times = {name: [] for name in work}
    for _ in range(repeats):
        for name, step in work.items():
            steps = gamma if name == "draft_step_ms" else 1
            times[name].append(1e3 * timed(tokens.device, step)[0] / steps)
    return times


def run(
    engine: Engine,
    work: Callable[[Callable[[], None]], Stats],  # decodes, calling what it is given every round
    show: "RowPrinter | None",
    profile: Path | None = None,
) -> Run:
    """Decode the prefilled batch from its first tokens, timed."""
    engine.rewind()
    show = show or (lambda: None)
    show()
    tracer = torch.profiler.profile() if profile else nullcontext()
    with tracer:
        seconds, stats = timed(engine.tokens.device, lambda: work(show))
    if profile:
        part = profile.with_name(profile.name + ".part")
        tracer.export_chrome_trace(str(part))
        part.replace(profile)
    return Run(stats, engine.outputs(), seconds)


class RowPrinter:
    """Prints the first row's text as it is decided."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prompt: list[int], out) -> None:
        self.engine, self.out = engine, out
        self.text = TextStream(tokenizer, prompt)
        self.done = len(prompt)

    def __call__(self) -> None:
        end = self.engine.seq_len[0].item()
        self.out.write(self.text.feed(self.engine.tokens[0, self.done : end].tolist()))
        self.out.flush()
        self.done = end


def prepare(
    args: argparse.Namespace,
) -> tuple[Engine, Auto | None, Tokenizer, list[list[int]]]:
    """Everything that bad input can break, the cheap things first: the weights come last."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    config, tokenizer = load_text_side(args.checkpoint_path)
    args.eos_ids = () if args.ignore_eos else eos_token_ids(args.checkpoint_path)
    prompts = read_prompts(args, tokenizer, config.max_seq_len)
    longest = config.max_seq_len
    if not args.interactive:
        longest = max(map(len, prompts)) + args.max_new_tokens
    draftings, draft_config = read_drafting(args), None
    if args.draft_checkpoint_path:
        draft_config, draft_tokenizer = load_text_side(args.draft_checkpoint_path)
        check_same_vocabulary(args, tokenizer, draft_tokenizer)
    if len(draftings) == 1:
        check_drafting(draftings[0], draft_config, longest)
    compiling = args.compile and compiler_runs(args.device)
    if args.compile and not compiling:
        print(
            "generate.py: no working compiler for torch.compile on this machine (the CPU needs "
            "g++): running eagerly, which is slower",
            file=sys.stderr,
        )
    model, draft_model = (
        path and load_model(path, args.device, DTYPES[args.dtype])
        for path in (args.checkpoint_path, args.draft_checkpoint_path)
    )
    for m in filter(None, (model, draft_model)) if compiling else ():
        compile_blocks(m)
    if not automatic(args):
        engine = Engine(
            model, len(prompts), longest, draftings[0], sampling, args.seed, draft_model
        )
        return engine, None, tokenizer, prompts
    engine = Engine(model, len(prompts), longest, Drafting(), sampling, args.seed)
    found = [Candidate(d) for d in draftings if not draft_model or args.draft == "auto"]
    if draft_model:
        named = "streaming" if args.draft == "auto" else args.draft
        found += [Candidate(d, draft_model) for d in draftings if d.policy == named]
    return engine, Auto(engine, found, gammas(args)), tokenizer, prompts


def automatic(args: argparse.Namespace) -> bool:
    """Whether there is something left to decide."""
    return args.draft != "none" and args.speculate_k != 0 and "auto" in (
        args.draft, args.speculate_k)  # fmt: skip


def read_drafting(args: argparse.Namespace) -> list[Drafting]:
    """What the flags allow: one way to draft, or with --draft auto several."""
    gamma = max(gammas(args))
    if args.draft == "none" or gamma == 0:
        return [Drafting(gamma=gamma)]

    def drafting(policy: str, reselect_every: int | None) -> Drafting:
        return Drafting(policy, gamma, args.draft_budget, args.n_sink, args.obs_window,
                        reselect_every, args.synthetic_acceptance)  # fmt: skip

    if args.draft != "auto":
        return [drafting(args.draft, args.reselect_every)]
    found, refusal = [], None
    for policy in AUTO_POLICIES:
        reselects = policy in POLICIES and POLICIES[policy].reselect_every
        try:
            found.append(drafting(policy, args.reselect_every if reselects else None))
        except ValueError as e:
            refusal = e
    if not any(d.policy in POLICIES for d in found):
        raise refusal
    return found


def gammas(args: argparse.Namespace) -> tuple[int, ...]:
    """Draft lengths that may be used."""
    return GAMMAS if args.speculate_k == "auto" else (args.speculate_k,)


def load_text_side(checkpoint_dir: Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of a directory; ValueError if they do not belong together."""
    config, tokenizer = load_config(checkpoint_dir), load_tokenizer(checkpoint_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint_dir}: tokenizer.model has {tokenizer.vocab_size} tokens, the model "
            f"only {config.vocab_size}: they do not belong together"
        )
    return config, tokenizer


def check_same_vocabulary(args, tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    """ValueError unless both models speak of the same tokens; padding rows do not matter."""
    n, m = tokenizer.vocab_size, draft_tokenizer.vocab_size
    why = f"they have {m} and {n} tokens" if n != m else f"both have {n} tokens, but others"
    if n != m or any(tokenizer.decode([i]) != draft_tokenizer.decode([i]) for i in range(n)):
        raise ValueError(
            f"{args.draft_checkpoint_path} cannot draft for {args.checkpoint_path}: {why}; "
            f"take a draft model of the same family"
        )


def measure(args, engine: Engine, auto: Auto | None, prompts, shows, say) -> Report:
    """Warm up, prefill, decode, time the steps; with --compare plainly too, from the same prefill.

    `shows` are the printers (or None) of the main run and of the baseline.
    """
    device = engine.tokens.device
    say("compiling" if engine.model.compiled else "warming up", end=" ... ")
    compile_seconds, _ = timed(device, lambda: warm_up(engine, auto))
    say(f"{compile_seconds:.1f} s")
    n_rows = len(prompts)

    def progress(row: int) -> None:
        if 4 * (row + 1) // n_rows > 4 * row // n_rows:
            say(f"{100 * (row + 1) // n_rows}%", end=" ")

    say(f"prefilling {sum(map(len, prompts)):,} tokens", end=" ... ")
    limits = [args.max_new_tokens] * n_rows
    prefill_seconds, _ = timed(
        device, lambda: engine.prefill(prompts, limits, args.eos_ids, progress)
    )
    say(f"{prefill_seconds:.1f} s")
    baseline = None
    if args.compare:
        say("decoding plainly", end=" ... ")
        baseline = run(engine, lambda show: decode(engine, 0, show), shows[1])
        say(f"{baseline.seconds:.1f} s")
    main_run = run(engine, decoder(engine, auto), shows[0], args.profile)
    if auto:
        say(auto.explain())
    if auto:
        auto.install(auto.chosen)
    engine.rewind()
    times = step_times(engine, gamma=auto.gamma if auto else None)
    step_ms = {name: statistics.median(values) for name, values in times.items()}
    return Report(
        engine, prompts, compile_seconds, prefill_seconds, step_ms, main_run, baseline, auto
    )


def table(report: Report) -> str:
    """The numbers of both runs, side by side."""
    engine, stats, ms = report.engine, report.main.stats, report.step_ms
    synthetic = "" if report.synthetic is None else f" (synthetic {report.synthetic})"
    name = engine.drafting.policy + synthetic if report.gamma else "plain"
    if report.auto:
        name = f"auto: {report.auto.chosen or 'no draft'}"
    runs = {"plain": report.baseline} if report.baseline else {}
    runs[name] = report.main
    lines = [f"{'':24}" + "".join(f"{head:>28}" for head in runs)]
    for label, value in {
        "decode tokens/s": lambda r: f"{r.tokens_per_second:.1f}",
        "ms per token": lambda r: f"{r.ms_per_token:.2f}",
        "rounds": lambda r: f"{r.stats.rounds}",
        "mean acceptance length": lambda r: f"{r.stats.mean_acceptance_length:.2f}",
    }.items():
        lines.append(f"{label:24}" + "".join(f"{value(r):>28}" for r in runs.values()))
    if stats.drafts:
        rates = " ".join(f"{rate:.3f}" for rate in stats.acceptance_rate_per_position)
        lines.append(
            f"acceptance rate {stats.draft_acceptance_rate:.3f}, by position {rates}{synthetic}"
        )
    steps = f"T_T {ms['target_step_ms']:.1f} ms"
    if report.gamma:
        ratio = ms["verify_ms"] / ms["target_step_ms"]
        steps += f", T_D {ms['draft_step_ms']:.1f} ms"
        steps += f", T_V({report.gamma}) {ms['verify_ms']:.1f} ms = {ratio:.2f} T_T"
    bandwidth = step_bytes(engine, report.prompts) / ms["target_step_ms"] / 1e6
    memory = peak_memory_bytes(engine.tokens.device) / 2**30
    lines.append(f"{steps}; T_T reads {bandwidth:.1f} GB/s; peak memory {memory:.1f} GiB")
    return "\n".join(lines)


def step_bytes(engine: Engine, prompts: list[list[int]]) -> int:
    """Bytes that a plain step after the prefill must read: K and V of the prompts, the weights."""
    spec = engine.full.spec
    kv_bytes = sum(map(len, prompts)) * spec.bytes_per_slot // spec.batch_size
    return kv_bytes + sum(p.nbytes for p in engine.model.parameters())  # tied weights count once


def top2_margin(engine: Engine, ids: list[int]) -> float:
    """Difference of the two largest logits after the tokens `ids`. Overwrites row 0."""
    engine.tokens[0, : len(ids)] = torch.tensor(ids)
    logits = engine.model.logits(engine.prefill_row(0, len(ids)))
    first, second = logits.float().topk(2).values.tolist()
    return first - second


def verdict(report: Report) -> str:
    """Speedup, and whether the outputs are the same; if not, where they part and how closely."""
    if report.speedup is None:
        return "nothing was left to decode after the first tokens"
    line = f"speedup {report.speedup:.2f}x over plain decoding"
    if report.synthetic is not None:
        return f"{line} (synthetic acceptance {report.synthetic}: the outputs mean nothing)"
    if report.identical is None:
        return line
    lines = [f"{line}, {sum(report.identical)} of {len(report.prompts)} outputs identical"]
    rows = zip(report.prompts, report.main.outputs, report.baseline.outputs, strict=True)
    for row, (prompt, ours, theirs) in enumerate(rows):
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = (same + [False]).index(False)
            margin = top2_margin(report.engine, prompt + theirs[:at])
            lines.append(f"row {row} differs from new token {at}; top-2 logit margin {margin:.2g}")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.machine()


def environment(engine: Engine) -> dict:
    device = engine.tokens.device
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(engine.full.spec.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiled": engine.model.compiled,
    }


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_json(report: Report, r: Run) -> dict:
    """One run's figures; the speculative keys only if it drafted."""
    stats = r.stats
    result = {
        "decode_tokens_per_second": r.tokens_per_second,
        "ms_per_token": r.ms_per_token,
        "decode_seconds": r.seconds,
        "prefill_seconds": report.prefill_seconds,
        "compile_seconds": report.compile_seconds,
        "generated_tokens": sum(map(len, r.outputs)),
        "peak_memory_bytes": peak_memory_bytes(report.engine.tokens.device),
        "target_step_ms": report.step_ms["target_step_ms"],
    }
    if stats.drafts:
        result |= {
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
            "acceptance_rate_per_position": stats.acceptance_rate_per_position,
            "accepted_histogram": stats.accepted_histogram,
            **report.step_ms,
        }
    return result


def to_json(report: Report, tokenizer: Tokenizer) -> dict:
    """The object that `--json` writes; keys that do not apply are absent."""
    engine, drafting = report.engine, report.engine.drafting
    plan = {"strategy": "none", "gamma": 0}
    if report.gamma:
        plan = {"strategy": drafting.policy, "gamma": engine.gamma}
        if drafting.policy not in ("full", "ngram"):
            plan["draft_budget"] = drafting.budget
        if engine.drafter.select_every:
            plan["select_every"] = engine.drafter.select_every
    if report.auto:
        plan |= report.auto.decision() | {"gamma": report.auto.gamma}
    if report.synthetic is not None:
        plan["synthetic_acceptance"] = report.synthetic
    eos = set(engine.eos.tolist())
    result = {
        "environment": environment(engine),
        "model": asdict(engine.model.config),
        "plan": plan,
        "outputs": [
            {
                "prompt_length": len(prompt),
                "token_ids": ids,
                "text": continuation(tokenizer, prompt, ids),
                "finish_reason": "eos" if ids[-1] in eos else "length",
            }
            for prompt, ids in zip(report.prompts, report.main.outputs, strict=True)
        ],
    }
    if isinstance(engine.drafter, ModelDrafter):
        result["draft_model"] = asdict(engine.drafter.model.config)
    name = "speculative" if report.gamma or report.auto else "baseline"
    result[name] = run_json(report, report.main)
    if report.baseline:
        result["baseline"] = run_json(report, report.baseline)
    if report.speedup is not None:
        result["speedup"] = report.speedup
    if report.identical is not None:
        result["identical"] = all(report.identical)
    return result


def describe(args: argparse.Namespace, engine: Engine, auto: Auto | None, prompts) -> str:
    """What is about to run, in three lines."""
    n_params = sum(p.numel() for p in engine.model.parameters())
    lengths, s = [len(p) for p in prompts], engine.sampling
    how = "greedy" if s.greedy else f"temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}"
    draft = "no draft: plain decoding"
    if auto:
        what = ", ".join(map(str, auto.candidates))
        draft = f"auto: {what}; gamma of {', '.join(map(str, auto.gammas))}, or no draft"
    elif engine.gamma:
        draft = describe_draft(args.draft_checkpoint_path, engine)
    return (
        f"{args.checkpoint_path}: {n_params / 1e6:.1f}M parameters, {args.dtype} on {args.device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        f"{len(prompts)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
        f"{args.max_new_tokens} new ones each, {how}\n{draft}"
    )


def describe_draft(draft_dir: Path | None, engine: Engine) -> str:
    """Who drafts, from what, and how far."""
    drafting, every = engine.drafting, engine.drafter.select_every
    who = f"draft model {draft_dir}" if draft_dir else "self-speculation"
    what = f"{drafting.policy} draft cache of {drafting.budget} tokens ({drafting.n_sink} sinks)"
    if drafting.policy == "full":
        what = "full draft cache"
    elif drafting.policy == "ngram":
        who, what = "prompt lookup", f"matches of at most {NGRAM} tokens"
    again = f", selected again every {every} rounds" if every else ""
    return f"{who}, {what}{again}, gamma {engine.gamma}"


def batch(args, engine: Engine, auto: Auto | None, tokenizer: Tokenizer, prompts) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    out = sys.stderr if args.json == "-" else sys.stdout

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=out, flush=True)

    say(describe(args, engine, auto, prompts))
    live, shows = out.isatty(), (None, None)
    if live:  # the baseline pays for the same work, so that the speedup is fair
        shows = [RowPrinter(engine, tokenizer, prompts[0], o) for o in (out, io.StringIO())]
    report = measure(args, engine, auto, prompts, shows, say)
    if live:
        say(shows[0].text.close())
    else:
        say("\nrow 0 continues:\n" + continuation(tokenizer, prompts[0], report.main.outputs[0]))
    say("\n" + table(report))
    if report.baseline:
        say(verdict(report))
    if args.json == "-":
        print(json.dumps(to_json(report, tokenizer), indent=2))
    elif args.json:
        write_json(to_json(report, tokenizer), Path(args.json))
    return 1 if args.check_lossless and not all(report.identical) else 0


def converse(args, engine: Engine, auto: Auto | None, tokenizer: Tokenizer) -> int:
    """Continue one prompt after another from standard input, until it ends."""
    rows, longest = len(engine.rows), engine.model.config.max_seq_len - args.max_new_tokens
    warm_up(engine, auto)
    while True:
        try:
            text = input("\nprompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        prompt = tokenizer.encode(text) if text else []
        if not 1 <= len(prompt) <= longest:
            print(f"a prompt needs 1 to {longest} tokens; this one has {len(prompt)}")
            continue
        engine.prefill([prompt] * rows, [args.max_new_tokens] * rows, args.eos_ids)
        show = RowPrinter(engine, tokenizer, prompt, sys.stdout)
        result = run(engine, decoder(engine, auto), show)
        print(show.text.close())
        print(
            f"[{result.tokens_per_second:.1f} tokens/s, mean acceptance length "
            f"{result.stats.mean_acceptance_length:.2f}]",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    try:
        with torch.inference_mode():
            args = parse_args(argv)
            engine, auto, tokenizer, prompts = prepare(args)
            if args.interactive:
                return converse(args, engine, auto, tokenizer)
            return batch(args, engine, auto, tokenizer, prompts)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print("generate.py:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
