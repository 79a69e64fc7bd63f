"""The command line: prompts in, text and numbers out.

    python generate.py                        # the demo: 16 long prompts, plain and speculative
    python generate.py --checkpoint_path DIR --prompt_file book.txt --max_new_tokens 512 --compare

A run loads the model, reads the prompts, compiles, prefills, and decodes: once with the chosen
draft, and with `--compare` once more plainly, in the same process with the same caches and compiled
blocks, from the same prefill. It ends with a table (`report.py`). Timing lives here: the engine has
none.

What a user can get wrong ends in one line on standard error and exit status 2.
"""

import argparse
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs


def interrupted(*_: object) -> None:
    """Ends the process, with the line and the status that `main` has for it."""
    os.write(2, b"\ngenerate.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)  # the imports take seconds; `main` puts it back

import torch

from auto import Auto, Candidate, draft_lengths
from chat import Chat, load_chat
from checkpoint import check_writable, eos_token_ids, load_model, write_file, write_json
from config import ModelConfig, is_random, kv_bytes_per_token, load_config
from cost_model import Parser
from device import check_fits, compiler_runs, timed
from drafters import NGRAM, ModelDrafter, Strategy, check_strategy
from model import Transformer, compile_blocks
from policies import POLICIES
from prompts import encode_prompt, read_prompts
from report import Report, Run, table, to_json, verdict
from spec_decode import MAX_EOS, Engine, Sampling, Stats, decode
from tokenizer import NumberTokenizer, TextStream, Tokenizer, continuation, load_tokenizer

DEMO_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "demo"
AUTO_POLICIES = ("ngram", "streaming", "snapkv")  # what --draft auto chooses from
LARGE = 10**9  # bytes of weights from which loading is worth a line
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--checkpoint_path",
        type=Path,
        default=DEMO_CHECKPOINT,
        help="Hugging Face directory; random:llama-3.1-8b: random weights of that geometry",
    )
    p.add_argument(
        "--draft_checkpoint_path", type=Path, help="draft with this smaller model of its own"
    )
    p.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text; an integer N: N random tokens, different ones in every row",
    )
    p.add_argument(
        "--prompt_file", action="append", default=[], type=Path, help="UTF-8 text (repeatable)"
    )
    p.add_argument("--prompts", type=Path, help='.jsonl, an object with "prompt" per line')
    p.add_argument("--batch_size", type=int, help="rows; prompts are repeated to fill them")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--max_context", type=int, metavar="N",
                   help="most tokens of prompt and answer; default: the model's own")  # fmt: skip
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
    p.add_argument("--draft_budget", type=int, default=Strategy().budget,
                   help="tokens of KV that the draft reads per row, sinks included")  # fmt: skip
    p.add_argument("--n_sink", type=int, default=Strategy().n_sink)
    p.add_argument("--obs_window", type=int, default=Strategy().obs_window,
                   help="newest tokens that are observed; default: the policy's own")  # fmt: skip
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
    p.add_argument(
        "--chat", action="store_true", help="put prompts into the checkpoint's chat template"
    )
    p.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    p.add_argument("--interactive", action="store_true",
                   help="prompts from standard input; with --chat, a conversation")  # fmt: skip
    p.add_argument(
        "--json", metavar="FILE", help="write the numbers and outputs; -: standard output"
    )
    args = p.parse_args(argv)
    check_args(args)
    return args


def int_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor auto") from None


def check_args(args: argparse.Namespace) -> None:
    """ValueError for values and combinations that make no sense; fills in dependent defaults."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    if args.batch_size is not None and not 1 <= args.batch_size < 2**31:
        raise ValueError(f"--batch_size {args.batch_size} must be in 1..2**31 - 1")
    given = sum(map(bool, (args.prompt, args.prompt_file, args.prompts, args.interactive)))
    if given > 1:
        raise ValueError("give one of --prompt, --prompt_file, --prompts and --interactive")
    drafts = args.draft != "none" and args.speculate_k != 0
    if args.compare is None:
        args.compare = args.check_lossless or (drafts and not given)
    for flag in ("check_lossless", "compare", "synthetic_acceptance"):
        value = getattr(args, flag)
        if value is not None and value is not False and not drafts:
            raise ValueError(f"--{flag} needs a draft: not --draft none, not --speculate_k 0")
    if args.interactive and (args.compare or args.json or args.profile):
        raise ValueError("--interactive has no --compare, --check_lossless, --json or --profile")
    if args.check_lossless and (args.temperature > 0 or args.synthetic_acceptance is not None):
        raise ValueError(
            "--check_lossless compares greedy outputs: no --temperature, no --synthetic_acceptance"
        )
    if args.check_lossless and not args.compare:
        raise ValueError("--check_lossless needs the plain run that --no-compare leaves out")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be in 0..2**63 - 1")
    if args.max_context is not None and args.max_context < 2:
        raise ValueError(f"--max_context {args.max_context} must be at least 2")
    if args.interactive and is_random(args.checkpoint_path):
        raise ValueError("--interactive needs a tokenizer, which random weights do not have")
    if args.chat and not given:
        raise ValueError("--chat needs a --prompt, --prompt_file, --prompts or --interactive")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat: without a template there is no place for it")
    check_targets(args)
    if args.draft_checkpoint_path and not drafts:
        raise ValueError("--draft_checkpoint_path needs a draft: not --draft none, --speculate_k 0")
    if args.synthetic_acceptance is not None and "auto" in (args.draft, args.speculate_k):
        raise ValueError("--synthetic_acceptance needs a --draft and a --speculate_k, not auto")
    args.device = check_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")


def check_targets(args: argparse.Namespace) -> None:
    """ValueError for files and streams that cannot be used at the end of a run."""
    if sys.stdout is None or (args.interactive and sys.stdin is None):
        raise ValueError(
            "standard output must be open, and with --interactive standard input; for no output "
            "write > /dev/null"
        )
    targets = []
    for flag, path in (("json", args.json), ("profile", args.profile)):
        if path is None or path == "-":
            continue
        if not str(path):
            raise ValueError(f"--{flag} needs the name of a file")
        try:
            check_writable(Path(path))
        except OSError as e:
            raise ValueError(f"--{flag}: cannot write {path}: {e.strerror}") from None
        targets.append(os.path.realpath(path))
    if len(set(targets)) < len(targets):
        raise ValueError(f"--json and --profile are the same file, {args.json}; give two")


def check_device(name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)  # streams and graphs are of the current device
    return device


def decoder(engine: Engine, auto: Auto | None) -> Callable[[Callable[[], None]], Stats]:
    """What decodes the batch: the automatic choice, or the drafting that was asked for."""
    return auto.decode if auto else lambda on_round: decode(engine, on_round=on_round)


def warm_up(engine: Engine, auto: Auto | None, later_turns: bool = False) -> None:
    """Compile every shape that will run; the automatic choice is calibrated."""
    engine.warm_up(later_turns)
    if auto:
        auto.prepare()


def step_times(
    engine: Engine, repeats: int = 9, gamma: int | None = None, **more: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds, by repeat, of a plain step, a draft step, a verification, and of more work.

    A plain step and a verification end with what is decided from their logits; of the latter that
    part, sampling for instance, is timed alone too (accept_ms). All are taken in turn, so that they
    see the same machine.
    """
    gamma, nothing = engine.gamma if gamma is None else gamma, engine.draft(0)
    work = {"target_step_ms": lambda: engine.decide(nothing)}
    if gamma:
        engine.refresh()
        draft = engine.draft(gamma)
        logits = engine.verify(draft.tokens)
        work["draft_step_ms"] = lambda: engine.draft(gamma)
        work["verify_ms"] = lambda: engine.decide(draft)
        work["accept_ms"] = lambda: engine.accept(draft, logits)
    work = more | {name: engine.capture(step) for name, step in work.items()}
    times = {name: [] for name in work}
    for _ in range(repeats):
        for name, step in work.items():
            steps = gamma if name == "draft_step_ms" else 1
            times[name].append(1e3 * timed(engine.tokens.device, step)[0] / steps)
    return times


def run(
    engine: Engine,
    work: Callable[[Callable[[], None]], Stats],  # decodes, calling what it is given every round
    show: Callable[[], None] = lambda: None,
    tracer: AbstractContextManager | None = None,  # a profiler
) -> Run:
    """Decode the prefilled batch from its first tokens, timed."""
    engine.rewind()
    show()
    with tracer or nullcontext():
        seconds, stats = timed(engine.tokens.device, lambda: work(show))
    return Run(stats, engine.outputs(), seconds)


class RowPrinter:
    """Prints the first row's text as it is decided, for which it waits for every round."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prompt: list[int], out) -> None:
        self.engine, self.out = engine, out
        self.text = TextStream(tokenizer, prompt)
        self.done = len(prompt)

    def __call__(self) -> None:
        end = self.engine.seq_len[0].item()
        ids, eos = self.engine.tokens[0, self.done : end].tolist(), self.engine.eos.tolist()
        self.out.write(self.text.feed([i for i in ids if i not in eos]))
        self.out.flush()
        self.done = end


def save_trace(tracer: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace. OSError if there is no room for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        tracer.export_chrome_trace(str(file))  # which does not say if it could not
        if not file.is_file():
            raise OSError(f"{path}: the trace does not fit into {tempfile.gettempdir()}")
        write_file(file.read_bytes(), path)


class Progress:
    """Says how far something is whenever another quarter of it is done."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say, self.quarters = say, 0

    def __call__(self, done: int, total: int) -> None:
        if 4 * done // total > self.quarters:
            self.quarters = 4 * done // total
            self.say(f"{25 * self.quarters}%", end=" ")


def load(path: Path, args: argparse.Namespace) -> Transformer:
    """The model; of a large one, standard error tells how far it is."""

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=sys.stderr, flush=True)

    progress = Progress(say)

    def on_tensor(done: int, total: int) -> None:
        if total >= LARGE:
            if not done:
                say(f"loading {path}: {total / 1e9:.1f} GB", end=" ... ")
            progress(done, total)
            if done == total:
                say("")

    return load_model(path, args.device, DTYPES[args.dtype], on_tensor)


def prepare(
    args: argparse.Namespace,
) -> tuple[Engine, Auto | None, Tokenizer, Chat | None, list[list[int]]]:
    """Everything that bad input can break, the cheap things first: the weights come last."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    config, tokenizer = load_text_side(args.checkpoint_path)
    chat = load_chat(args.checkpoint_path, tokenizer) if args.chat else None
    args.eos_ids = () if args.ignore_eos else end_tokens(args.checkpoint_path, chat)
    longest = min(config.max_seq_len, args.max_context or config.max_seq_len)
    prompts = read_prompts(args, tokenizer, chat, longest, partial(check_rows, args, config))
    if not args.interactive:
        longest = max(map(len, prompts)) + args.max_new_tokens
    strategies, draft_config = read_strategies(args, config), None
    if args.draft_checkpoint_path:
        draft_config, draft_tokenizer = load_text_side(args.draft_checkpoint_path)
        check_same_vocabulary(args, tokenizer, draft_tokenizer)
    if len(strategies) == 1:
        check_strategy(strategies[0], draft_config, longest)
    compiling = args.compile and compiler_runs(args.device)
    if args.compile and not compiling:
        print(
            "generate.py: no working compiler for torch.compile on this machine (the CPU needs "
            "g++): running eagerly, which is slower",
            file=sys.stderr,
        )
    model, draft_model = (
        path and load(path, args) for path in (args.checkpoint_path, args.draft_checkpoint_path)
    )
    for m in filter(None, (model, draft_model)) if compiling else ():
        compile_blocks(m)
    if not automatic(args):
        engine = Engine(
            model, len(prompts), longest, strategies[0], sampling, args.seed, draft_model
        )
        return engine, None, tokenizer, chat, prompts
    engine = Engine(model, len(prompts), longest, Strategy(), sampling, args.seed)
    found = [Candidate(d) for d in strategies if not draft_model or args.draft == "auto"]
    if draft_model:
        named = "streaming" if args.draft == "auto" else args.draft
        found += [Candidate(d, draft_model) for d in strategies if d.policy == named]
    auto = Auto(engine, found, gammas(args, config), named=args.draft != "auto")
    return engine, auto, tokenizer, chat, prompts


def check_rows(args: argparse.Namespace, config: ModelConfig, n_rows: int, n_tokens: int) -> None:
    """ValueError if the K and V of so many rows and tokens alone are too much for the device.

    The engine asks again, for all that it needs. Until then nothing may be made for every row.
    """
    n_bytes = n_rows * n_tokens * kv_bytes_per_token(config, DTYPES[args.dtype].itemsize)
    remedy = "a smaller --batch_size or --max_context"
    check_fits(n_bytes, args.device, "the KV caches", lambda share: remedy)


def end_tokens(checkpoint_dir: Path, chat: Chat | None) -> tuple[int, ...]:
    """The tokens that end a text, and the one that ends an answer in this chat format."""
    ids = eos_token_ids(checkpoint_dir) + ((chat.end_id,) if chat else ())
    ids = tuple(dict.fromkeys(ids))
    if len(ids) > MAX_EOS:
        raise ValueError(
            f"{checkpoint_dir}: {len(ids)} tokens end a text (eos_token_id); at most {MAX_EOS} are "
            f"possible"
        )
    return ids


def automatic(args: argparse.Namespace) -> bool:
    """Whether there is something left to decide."""
    return args.draft != "none" and args.speculate_k != 0 and "auto" in (
        args.draft, args.speculate_k)  # fmt: skip


def read_strategies(args: argparse.Namespace, config: ModelConfig) -> list[Strategy]:
    """What the flags allow: one way to draft, or with --draft auto several."""
    gamma = max(gammas(args, config))
    if args.draft == "none" or gamma == 0:
        return [Strategy(gamma=gamma)]

    def strategy(policy: str, reselect_every: int | None) -> Strategy:
        return Strategy(policy, gamma, args.draft_budget, args.n_sink, args.obs_window,
                        reselect_every, args.synthetic_acceptance)  # fmt: skip

    if args.draft != "auto":
        return [strategy(args.draft, args.reselect_every)]
    found, refusal = [], None
    for policy in AUTO_POLICIES:
        reselects = policy in POLICIES and POLICIES[policy].reselect_every
        try:
            found.append(strategy(policy, args.reselect_every if reselects else None))
        except ValueError as e:
            refusal = e
    if not any(d.policy in POLICIES for d in found):
        raise refusal
    return found


def gammas(args: argparse.Namespace, config: ModelConfig) -> tuple[int, ...]:
    """Draft lengths that may be used; config is the target's."""
    if args.speculate_k == "auto":
        return draft_lengths(args.device.type, config.n_group)
    return (args.speculate_k,)


def load_text_side(checkpoint_dir: Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of a directory; ValueError if they do not belong together."""
    config = load_config(checkpoint_dir)
    if is_random(checkpoint_dir):
        return config, NumberTokenizer(config.vocab_size)
    tokenizer = load_tokenizer(checkpoint_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint_dir}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
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


def measure(args, engine: Engine, auto: Auto | None, prompts, say, tracer) -> Report:
    """Warm up, prefill, decode, time the steps; with --compare plainly too, from the same prefill.

    Nothing is printed inside a timed run.
    """
    device = engine.tokens.device
    say("compiling" if engine.model.compiled else "warming up", end=" ... ")
    compile_seconds, _ = timed(device, lambda: warm_up(engine, auto))
    say(f"{compile_seconds:.1f} s")
    progress = Progress(say)
    say(f"prefilling {sum(map(len, prompts)):,} tokens", end=" ... ")
    limits = [args.max_new_tokens] * len(prompts)
    prefill_seconds, _ = timed(
        device,
        lambda: engine.prefill(
            prompts, limits, args.eos_ids, lambda b: progress(b + 1, len(prompts))
        ),
    )
    say(f"{prefill_seconds:.1f} s")
    draft_prefill_seconds = None
    if isinstance(engine.drafter, ModelDrafter):
        draft_prefill_seconds, _ = timed(device, engine.catch_up)
        say(f"prefilling the draft model ... {draft_prefill_seconds:.1f} s")
    baseline = None
    if args.compare:
        say("decoding plainly", end=" ... ")
        baseline = run(engine, lambda show: decode(engine, 0, show))
        say(f"{baseline.seconds:.1f} s")
    say("decoding", end=" ... ")
    main_run = run(engine, decoder(engine, auto), tracer=tracer)
    say(f"{main_run.seconds:.1f} s")
    if auto:
        say(auto.explain())
        auto.install(auto.chosen)
    engine.rewind()
    times = step_times(engine, gamma=auto.gamma if auto else None)
    step_ms = {name: statistics.median(values) for name, values in times.items()}
    return Report(
        engine,
        prompts,
        compile_seconds,
        prefill_seconds,
        draft_prefill_seconds,
        step_ms,
        main_run,
        baseline,
        auto,
    )


def describe(args: argparse.Namespace, engine: Engine, auto: Auto | None, prompts) -> str:
    """What is about to run, in three lines."""
    n_params = sum(p.numel() for p in engine.model.parameters())
    lengths, s = [len(p) for p in prompts], engine.sampling
    how = "greedy" if s.greedy else f"temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}"
    draft = "no draft: plain decoding"
    if auto:
        what = ", ".join(map(str, auto.candidates))
        draft = f"auto: {what}; gamma of {', '.join(map(str, auto.gammas))}"
        draft += "" if auto.named else ", or no draft"
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
    strategy, every = engine.strategy, engine.drafter.select_every
    who = f"draft model {draft_dir}" if draft_dir else "self-speculation"
    what = f"{strategy.policy} draft cache of {strategy.budget} tokens ({strategy.n_sink} sinks)"
    if strategy.policy == "full":
        what = "full draft cache"
    elif strategy.policy == "ngram":
        who, what = "prompt lookup", f"matches of at most {NGRAM} tokens"
    again = f", selected again every {every} rounds" if every else ""
    return f"{who}, {what}{again}, gamma {engine.gamma}"


def batch(args, engine: Engine, auto: Auto | None, tokenizer: Tokenizer, prompts) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    out = sys.stderr if args.json == "-" else sys.stdout

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=out, flush=True)

    say(describe(args, engine, auto, prompts))
    tracer = torch.profiler.profile() if args.profile else None
    report = measure(args, engine, auto, prompts, say, tracer)
    new = report.main.outputs[0]
    try:
        say("\nrow 0 continues:\n" + continuation(tokenizer, prompts[0], new))
        say("\n" + table(report))
        if report.baseline:
            say(verdict(report))
    finally:  # also where nobody reads standard output any more
        if args.json == "-":
            print(json.dumps(to_json(report, tokenizer), indent=2))
        elif args.json:
            write_json(to_json(report, tokenizer), Path(args.json))
        if tracer:
            save_trace(tracer, args.profile)
    return 1 if args.check_lossless and not all(report.identical) else 0


def converse(
    args, engine: Engine, auto: Auto | None, tokenizer: Tokenizer, chat: Chat | None
) -> int:
    """Answer one prompt after another from standard input, until it ends.

    With a chat template it is one conversation: its K and V stay in the cache, and of every turn
    only what is new is read. Otherwise every prompt stands for itself.
    """
    rows, longest = len(engine.rows), engine.max_len - args.max_new_tokens
    warm_up(engine, auto, later_turns=chat is not None)
    so_far: list[int] = []  # the conversation
    while True:
        try:
            text = input("\nprompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        try:
            prompt = encode_turn(text, args, tokenizer, chat, so_far)
        except ValueError as e:
            print(e)
            continue
        if so_far and len(prompt) > longest:
            print(f"the conversation would have {len(prompt)} tokens, of at most {longest}; "
                  "it begins anew with what you say next")  # fmt: skip
            so_far = []
            continue
        if not 1 <= len(prompt) <= longest:
            print(f"a prompt needs 1 to {longest} tokens; this one has {len(prompt)}")
            continue
        n_reused = engine.n_reused(0, prompt) if so_far else 0
        limits = [args.max_new_tokens] * rows
        engine.prefill([prompt] * rows, limits, args.eos_ids, reuse=bool(so_far))
        show = RowPrinter(engine, tokenizer, prompt, sys.stdout)
        result = run(engine, decoder(engine, auto), show)
        print(show.text.close())
        print(
            f"[{result.tokens_per_second:.1f} tokens/s, mean acceptance length "
            f"{result.stats.mean_acceptance_length:.2f}; of {len(prompt)} tokens of prompt "
            f"{n_reused} were in the cache]",
            file=sys.stderr,
        )
        if chat:
            answer = result.outputs[0]
            so_far = prompt + (answer[:-1] if answer[-1] in args.eos_ids else answer)


def encode_turn(
    text: str, args, tokenizer: Tokenizer, chat: Chat | None, so_far: list[int]
) -> list[int]:
    """Tokens of all that the model reads for this line; ValueError if it is no text."""
    if chat and text and so_far:
        return so_far + chat.reply(text)
    return encode_prompt(text, args, tokenizer, chat)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        prepare_streams()
        with torch.inference_mode():
            args = parse_args(argv)
            engine, auto, tokenizer, chat, prompts = prepare(args)
            if args.interactive:
                return converse(args, engine, auto, tokenizer, chat)
            return batch(args, engine, auto, tokenizer, prompts)
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not out_of_memory(e):
            raise
        return refused(e)
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130


def prepare_streams() -> None:
    """What is read is checked where it is encoded; what a terminal cannot show, it shows escaped.

    So neither ends the program.
    """
    if sys.stderr is None:  # else print() takes standard output for it
        sys.stderr = io.StringIO()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def out_of_memory(e: RuntimeError) -> bool:
    """Whether this is how torch says so; on the CPU it has no class of its own for it."""
    words = "can't allocate memory", "not enough memory"
    return isinstance(e, torch.OutOfMemoryError) or any(word in str(e) for word in words)


def refused(e: Exception) -> int:
    """Say in one line what was wrong; returns the exit status."""
    text = " ".join(str(e).split())
    if isinstance(e, (MemoryError, RuntimeError)):
        text = f"out of memory; use a smaller --batch_size or --max_context ({text})"
    if isinstance(e, BrokenPipeError):
        text = "nobody reads the output any more"
    print("generate.py:", text, file=sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # nobody reads it, or it is closed: Python would say so again
        sys.stdout = None
    return 2


if __name__ == "__main__":
    sys.exit(main())
