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
import json
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
import torch

from model import (
    compile_blocks,
    compiler_runs,
    eos_token_ids,
    load_model,
)
from spec_decode import Drafting, Engine, Sampling, Stats, decode
from tokenizer import TextStream, Tokenizer, continuation, load_tokenizer

DEMO_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "demo"
DEMO_MODULES = (  # standard modules that the demo checkpoint was not trained on
    "shutil", "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum",
    "inspect", "ipaddress", "logging", "optparse", "pdb", "pickle", "statistics", "subprocess",
    "tarfile", "threading", "typing", "zipfile",
)  # fmt: skip
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
        """Milliseconds from one token of a row to its next, averaged over rows."""
        return 1e3 * len(self.outputs) / self.tokens_per_second


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

    @property
    def speedup(self) -> float | None:
        return (
            self.main.tokens_per_second / self.baseline.tokens_per_second if self.baseline else None
        )

    @property
    def identical(self) -> list[bool]:
        """Per row: the same tokens as the baseline."""
        pairs = zip(self.main.outputs, self.baseline.outputs, strict=True)
        return [ours == theirs for ours, theirs in pairs]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line for the caller to print, instead of a usage text."""
        raise ValueError(f"{message} (see --help)")


def default(config: type, name: str):
    """The default of a config's field, so that it is written once."""
    return next(f.default for f in fields(config) if f.name == name)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--checkpoint_path", type=Path, default=DEMO_CHECKPOINT, help="Hugging Face directory"
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
    p.add_argument(
        "--temperature", type=float, default=default(Sampling, "temperature"), help="0: greedy"
    )
    p.add_argument("--top_k", type=int)
    p.add_argument("--top_p", type=float)
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--ignore_eos", action="store_true", help="go on to the limit")
    p.add_argument("--draft", default="streaming", help="whose KV the draft reads: none, streaming")
    p.add_argument("--speculate_k", "--gamma", type=int, default=default(Drafting, "gamma"),
                   help="draft tokens per round; 0: plain decoding")  # fmt: skip
    p.add_argument("--draft_budget", type=int, default=default(Drafting, "budget"),
                   help="tokens of KV that the draft reads per row, sinks included")  # fmt: skip
    p.add_argument("--n_sink", type=int, default=default(Drafting, "n_sink"))
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


def check_args(args: argparse.Namespace) -> None:
    """ValueError for values and combinations that make no sense; fills in dependent defaults."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size} must be at least 1")
    given = sum(map(bool, (args.prompt, args.prompt_file, args.prompts, args.interactive)))
    if given > 1:
        raise ValueError("give one of --prompt, --prompt_file, --prompts and --interactive")
    if args.compare is None:
        args.compare = args.check_lossless or not given
    if args.check_lossless and (args.temperature > 0 or args.synthetic_acceptance is not None):
        raise ValueError("--check_lossless compares greedy outputs: no --temperature, no "
                         "--synthetic_acceptance")  # fmt: skip
    if args.check_lossless and not args.compare:
        raise ValueError("--check_lossless needs the plain run that --no-compare leaves out")
    if args.synthetic_acceptance is not None and args.draft == "none":
        raise ValueError("--synthetic_acceptance needs a draft; --draft is none")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"--device {args.device!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch sees no GPU; use --device cpu")
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")


def module_source(name: str) -> str:
    """Source text of a top-level standard module, found without importing it."""
    return Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")


def demo_prompts(tokenizer: Tokenizer, n_rows: int, longest: int) -> list[list[int]]:
    """Beginnings of standard modules, cut to different lengths of at most `longest` tokens.

    Long and short rows alternate: threads share the rows of a batch in contiguous parts.
    """
    shortest = longest * DEMO_SHORTEST // DEMO_LONGEST
    prompts = []
    for row in range(n_rows):
        rank = n_rows - 1 - row // 2 if row % 2 else row // 2
        length = shortest + (longest - shortest) * rank // max(n_rows - 1, 1)
        ids = tokenizer.encode(module_source(DEMO_MODULES[row % len(DEMO_MODULES)]))
        prompts.append(ids[:length])
    return prompts


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None


def read_jsonl(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            texts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: not an object with "prompt"') from None
    return texts


def read_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer, max_context: int
) -> list[list[int]]:
    """Token ids of every row of the batch."""
    longest = max_context - args.max_new_tokens  # prompt tokens that leave room for the answer
    if longest < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} does not fit into the model's "
                         f"context of {max_context} tokens")  # fmt: skip
    texts = args.prompt + [read_text(path) for path in args.prompt_file]
    if args.prompts:
        texts = read_jsonl(args.prompts)
    if not (args.prompt or args.prompt_file or args.prompts):
        return demo_prompts(tokenizer, args.batch_size or DEMO_ROWS, min(DEMO_LONGEST, longest))
    generator = torch.Generator().manual_seed(args.seed)
    prompts = []
    for text in texts:
        if args.prompt and text.isdecimal():
            size = (int(text),)
            prompts.append(torch.randint(tokenizer.vocab_size, size, generator=generator).tolist())
        else:
            prompts.append(tokenizer.encode(text) if text else [])
    for number, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {number} is empty; nothing can follow from it")
        if len(ids) > longest:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens; the model's context of {max_context} "
                f"leaves room for {longest} with --max_new_tokens {args.max_new_tokens}"
            )
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompts")
    n_rows = args.batch_size or len(prompts)
    if n_rows < len(prompts):
        raise ValueError(f"--batch_size {n_rows} is less than the {len(prompts)} prompts given")
    return [prompts[row % len(prompts)] for row in range(n_rows)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, object]:
    """Seconds that the work took, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def warm_up(engine: Engine, gamma: int, plain: bool) -> None:
    """Compile every shape that will run, twice each; decides no tokens."""
    for _ in range(2):
        engine.prefill_row(0, 1)
        for g in sorted({gamma, 0} if plain else {gamma}):
            engine.verify(engine.draft(g).tokens)


def step_times(engine: Engine, gamma: int, repeats: int = 9) -> dict[str, float]:
    """Median milliseconds of a plain step, and of a draft step and a verification."""
    device = engine.tokens.device

    def median(work: Callable[[], object]) -> float:
        return 1e3 * statistics.median(timed(device, work)[0] for _ in range(repeats))

    nothing = engine.draft(0).tokens
    times = {"target_step_ms": median(lambda: engine.verify(nothing).argmax(dim=-1))}
    if gamma:
        tokens = engine.draft(gamma).tokens
        times["draft_step_ms"] = median(lambda: engine.draft(gamma)) / gamma
        times["verify_ms"] = median(lambda: engine.verify(tokens).argmax(dim=-1))
    return times


def run(engine: Engine, gamma: int, show: Callable[[], None], profile: Path | None = None) -> Run:
    """Decode the prefilled batch from its first tokens, timed."""
    engine.rewind()
    tracer = torch.profiler.profile() if profile else nullcontext()
    with tracer:
        seconds, stats = timed(engine.tokens.device, lambda: decode(engine, gamma, show))
    if profile:
        tracer.export_chrome_trace(str(profile))
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


def prepare(args: argparse.Namespace) -> tuple[Engine, Tokenizer, list[list[int]]]:
    """Everything that bad input can break: checkpoint, prompts, sizes, memory."""
    device = torch.device(args.device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    drafting = Drafting(
        args.draft, args.speculate_k, args.draft_budget, args.n_sink, args.synthetic_acceptance
    )
    tokenizer = load_tokenizer(args.checkpoint_path)
    model = load_model(args.checkpoint_path, device, DTYPES[args.dtype])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{args.checkpoint_path}: tokenizer.model has {tokenizer.vocab_size} tokens, the model "
            f"only {model.config.vocab_size}: they do not belong together"
        )
    if args.interactive:
        prompts, max_len = [[]] * (args.batch_size or 1), model.config.max_seq_len
    else:
        prompts = read_prompts(args, tokenizer, model.config.max_seq_len)
        max_len = max(map(len, prompts)) + args.max_new_tokens
    if args.compile and not compiler_runs(device):
        print("generate.py: no working compiler for torch.compile on this machine (the CPU needs "
              "g++): running eagerly, which is slower", file=sys.stderr)  # fmt: skip
        args.compile = False
    if args.compile:
        compile_blocks(model)
    return Engine(model, len(prompts), max_len, drafting, sampling, args.seed), tokenizer, prompts


def measure(
    args: argparse.Namespace, engine: Engine, prompts: list[list[int]], show, say
) -> Report:
    """Warm up, prefill, time the steps, decode; what `--compare` asks for from the same prefill."""
    device, gamma = engine.tokens.device, engine.drafting.gamma if engine.drafting.enabled else 0
    say("compiling" if args.compile else "warming up", end=" ... ")
    compile_seconds, _ = timed(device, lambda: warm_up(engine, gamma, plain=True))
    say(f"{compile_seconds:.1f} s")
    n_rows = len(prompts)

    def progress(row: int) -> None:
        if 4 * (row + 1) // n_rows > 4 * row // n_rows:
            say(f"{100 * (row + 1) // n_rows}%", end=" ")

    say(f"prefilling {sum(map(len, prompts)):,} tokens", end=" ... ")
    limits = [args.max_new_tokens] * len(prompts)
    eos = () if args.ignore_eos else eos_token_ids(args.checkpoint_path)
    prefill_seconds, _ = timed(device, lambda: engine.prefill(prompts, limits, eos, progress))
    say(f"{prefill_seconds:.1f} s")
    step_ms = step_times(engine, gamma)
    baseline = None
    if args.compare:
        say("decoding plainly", end=" ... ")
        baseline = run(engine, 0, lambda: None)
        say(f"{baseline.seconds:.1f} s")
    main_run = run(engine, gamma, show, args.profile)
    return Report(engine, prompts, compile_seconds, prefill_seconds, step_ms, main_run, baseline)


def table(report: Report) -> str:
    """The numbers of both runs, side by side."""
    runs = [r for r in (report.baseline, report.main) if r]
    drafting = report.engine.drafting
    name = drafting.policy if drafting.enabled else "plain"
    heads = (["plain"] if report.baseline else []) + [name]
    lines = [f"{'':28}" + "".join(f"{h:>14}" for h in heads)]

    def line(label: str, values: list[str]) -> None:
        lines.append(f"{label:28}" + "".join(f"{v:>14}" for v in values))

    line("decode tokens/s", [f"{r.tokens_per_second:.1f}" for r in runs])
    line("ms per token and row", [f"{r.ms_per_token:.2f}" for r in runs])
    line("rounds", [str(r.stats.rounds) for r in runs])
    line("mean acceptance length", [f"{r.stats.mean_acceptance_length:.2f}" for r in runs])
    stats, ms = report.main.stats, report.step_ms
    if drafting.enabled:
        rates = " ".join(f"{rate:.3f}" for rate in stats.acceptance_rate_per_position)
        synthetic = drafting.synthetic_acceptance
        label = "" if synthetic is None else f"  (synthetic, drawn at {synthetic})"
        lines += [
            f"acceptance rate {stats.draft_acceptance_rate:.3f}, by position {rates}{label}",
            f"T_T {ms['target_step_ms']:.1f} ms, T_D {ms['draft_step_ms']:.1f} ms, "
            f"T_V({stats.gamma}) {ms['verify_ms']:.1f} ms = "
            f"{ms['verify_ms'] / ms['target_step_ms']:.2f} T_T",
        ]
    else:
        lines.append(f"T_T {ms['target_step_ms']:.1f} ms")
    return "\n".join(lines)


def top2_margin(engine: Engine, ids: list[int]) -> float:
    """Difference of the two largest logits after the tokens `ids`. Overwrites row 0."""
    engine.tokens[0, : len(ids)] = torch.tensor(ids)
    logits = engine.model.logits(engine.prefill_row(0, len(ids)))
    first, second = logits.float().topk(2).values.tolist()
    return first - second


def verdict(report: Report) -> str:
    """Speedup, and whether the outputs are the same; if not, where they part and how closely."""
    same = report.identical
    lines = [
        f"speedup {report.speedup:.2f}x over plain decoding, "
        f"{sum(same)} of {len(same)} outputs identical"
    ]
    if not report.engine.sampling.greedy or report.engine.drafting.synthetic_acceptance is not None:
        return f"speedup {report.speedup:.2f}x over plain decoding"
    for row, ours, theirs in zip(
        range(len(same)), report.main.outputs, report.baseline.outputs, strict=True
    ):
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            margin = top2_margin(report.engine, report.prompts[row] + theirs[:at])
            lines.append(
                f"row {row} differs from new token {at} on; top-2 logit margin {margin:.2g}"
            )
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
        "compiled": engine.model.flex or engine.model.layers[0]._compiled_call_impl is not None,
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
    if stats.gamma:
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
    engine, stats = report.engine, report.main.stats
    config = engine.model.config
    drafting = engine.drafting
    plan = {"strategy": "none", "gamma": 0}
    if drafting.enabled:
        plan = {"strategy": drafting.policy, "draft_budget": drafting.budget, "gamma": stats.gamma}
    if drafting.synthetic_acceptance is not None:
        plan["synthetic_acceptance"] = drafting.synthetic_acceptance
    eos = set(engine.eos.tolist())
    result = {
        "environment": environment(engine),
        "model": {
            f.name: getattr(config, f.name) for f in fields(config) if f.name != "rope_scaling"
        },
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
    result["speculative" if drafting.enabled else "baseline"] = run_json(report, report.main)
    if report.baseline:
        result["baseline"] = run_json(report, report.baseline)
        result |= {"speedup": report.speedup, "identical": all(report.identical)}
    return result


def write_json(value: dict, path: str) -> None:
    """To a file in one step, so that an interrupted run leaves no half of it; "-": to stdout."""
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    part = Path(path + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def describe(args: argparse.Namespace, engine: Engine, prompts: list[list[int]]) -> str:
    """What is about to run, in three lines."""
    n_params = sum(p.numel() for p in set(engine.model.parameters()))
    lengths, drafting, s = [len(p) for p in prompts], engine.drafting, engine.sampling
    how = "greedy" if s.greedy else f"temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}"
    draft = "no draft: plain decoding"
    if drafting.enabled:
        draft = (f"self-speculation, {drafting.policy} draft cache of {drafting.budget} tokens "
                 f"({drafting.n_sink} sinks), gamma {drafting.gamma}")  # fmt: skip
    return (
        f"{args.checkpoint_path}: {n_params / 1e6:.1f}M parameters, {args.dtype} on {args.device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        f"{len(prompts)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
        f"{args.max_new_tokens} new ones each, {how}\n{draft}"
    )


def batch(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, prompts) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    out = sys.stderr if args.json == "-" else sys.stdout

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=out, flush=True)

    say(describe(args, engine, prompts))
    live = out.isatty()
    show = RowPrinter(engine, tokenizer, prompts[0], out) if live else lambda: None
    report = measure(args, engine, prompts, show, say)
    if live:
        say(show.text.close())
    else:
        say("\nrow 0 continues:\n" + continuation(tokenizer, prompts[0], report.main.outputs[0]))
    say("\n" + table(report))
    if report.baseline:
        say(verdict(report))
    if args.json:
        write_json(to_json(report, tokenizer), args.json)
    return 1 if args.check_lossless and not all(report.identical) else 0


def converse(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer) -> int:
    """Continue one prompt after another from standard input, until it ends."""
    gamma = engine.drafting.gamma if engine.drafting.enabled else 0
    rows, eos = len(engine.rows), () if args.ignore_eos else eos_token_ids(args.checkpoint_path)
    longest = engine.model.config.max_seq_len - args.max_new_tokens
    while True:
        try:
            text = input("\nprompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        prompt = tokenizer.encode(text)
        if not text or len(prompt) > longest:
            print(
                f"a prompt needs 1 to {longest} tokens; this one has {len(prompt) if text else 0}"
            )
            continue
        engine.prefill([prompt] * rows, [args.max_new_tokens] * rows, eos)
        show = RowPrinter(engine, tokenizer, prompt, sys.stdout)
        result = run(engine, gamma, show)
        print(show.text.close())
        print(f"[{result.tokens_per_second:.1f} tokens/s, mean acceptance length "
              f"{result.stats.mean_acceptance_length:.2f}]", file=sys.stderr)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    try:
        with torch.inference_mode():
            try:
                args = parse_args(argv)
                engine, tokenizer, prompts = prepare(args)
            except (ValueError, OSError) as e:
                print(f"generate.py: {e}", file=sys.stderr)
                return 2
            if args.interactive:
                return converse(args, engine, tokenizer)
            return batch(args, engine, tokenizer, prompts)
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
