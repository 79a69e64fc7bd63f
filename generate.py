"""The command line: prompts in, text and numbers out.

    python generate.py                        # the demo: 16 long prompts, plain and speculative
    python generate.py --checkpoint_path DIR --prompt_file book.txt --max_new_tokens 512 --compare

`Options` are the flags, checked; nobody writes into them, and nothing below this file sees them.
`load` makes all that a run needs, the cheap things first. Then `batch` decodes one batch and says
what came of it (`measure.py`, `report.py`), or `converse` answers line by line.

What a user can get wrong ends in one line on standard error and exit status 2.
"""

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs


def interrupted(*_: object) -> None:
    """Ends the process, with the line and the status that `main` has for it."""
    os.write(2, b"\ngenerate.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)  # the imports take seconds; `main` puts it back

import torch

import prompts
import report
from auto import Auto, Candidate, draft_lengths
from batch import MAX_EOS
from checkpoint import (
    DEMO_CHECKPOINT,
    DTYPES,
    Checkpoint,
    check_writable,
    open_checkpoint,
    write_file,
    write_json,
)
from config import is_random, kv_bytes_per_token
from cost_model import Parser
from device import check_fits, compiler_runs, find_device, timed
from drafters import check_strategy
from measure import Progress, Request, decode, measure, warm_up
from model import Transformer, compile_blocks
from policies import POLICIES, Strategy
from sampling import Sampling
from spec_decode import Engine
from tokenizer import TextStream, Tokenizer, continuation

AUTO_POLICIES = ("ngram", "streaming", "snapkv")  # what --draft auto chooses from
LARGE = 10**9  # bytes of weights from which loading is worth a line
SAMPLING, STRATEGY = Sampling(), Strategy()  # whose defaults are the flags'


def flag(default: object, meaning: str | None = None, *names: str, **how: Any) -> Any:
    """A field of Options: its default, what `--help` says, other names, more for argparse."""
    return field(default=default, metadata={"names": names, "how": {"help": meaning, **how}})


def int_or_auto(text: str) -> int | str:
    """A number of drafts, or the word."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor auto") from None


@dataclass(frozen=True, slots=True)
class Options:
    """The flags. ValueError for values and combinations that make no sense."""

    checkpoint_path: Path = flag(DEMO_CHECKPOINT, "Hugging Face directory; or random:llama-3.1-8b")
    draft_checkpoint_path: Path | None = flag(None, "draft with this smaller model of its own")
    prompt: tuple[str, ...] = flag((), "text; an integer N: N random tokens, others in every row")
    prompt_file: tuple[Path, ...] = flag((), "UTF-8 text (repeatable)")
    prompts: Path | None = flag(None, '.jsonl, an object with "prompt" per line')
    batch_size: int | None = flag(None, "rows; prompts are repeated to fill them")
    max_new_tokens: int = flag(256, "of every row")
    max_context: int | None = flag(None, "most tokens of prompt and answer; default: the model's")
    temperature: float = flag(SAMPLING.temperature, "0: greedy")
    top_k: int | None = flag(SAMPLING.top_k)
    top_p: float | None = flag(SAMPLING.top_p)
    seed: int = flag(1234)
    ignore_eos: bool = flag(False, "go on to the limit")
    draft: str = flag("auto", f"how to draft: auto, none, ngram, {', '.join(POLICIES)}; "
                              "with --draft_checkpoint_path also full")  # fmt: skip
    speculate_k: int | str = flag("auto", "draft tokens per round; 0: plain decoding",
                                  "--gamma", type=int_or_auto, metavar="N|auto")  # fmt: skip
    draft_budget: int = flag(STRATEGY.budget, "tokens of KV that a draft reads per row, with sinks")
    n_sink: int = flag(STRATEGY.n_sink)
    obs_window: int | None = flag(None, "newest tokens observed; default: the policy's own")
    reselect_every: int | None = flag(None, "rounds until the KV is selected again; 0: never")
    compare: bool | None = flag(None, "run plain decoding too")
    check_lossless: bool = flag(False, "compare, and exit 1 on a difference")
    compile: bool = flag(True)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu")
    dtype: str | None = flag(None, "default: float32 on the CPU, bfloat16 on a GPU", choices=DTYPES)
    profile: Path | None = flag(None, "write a Chrome trace of the decoding to this file")
    chat: bool = flag(False, "put prompts into the checkpoint's chat template")
    system: str | None = flag(None, "with --chat: the system message")
    interactive: bool = flag(False, "prompts from standard input; with --chat, a conversation")
    json: str | None = flag(None, "write numbers and outputs to this file; -: standard output")

    def __post_init__(self) -> None:
        for wrong, why in self.refusals():
            if wrong:
                raise ValueError(why)

    def refusals(self) -> tuple[tuple[object, str], ...]:
        """What may be wrong with the values and their combinations, and what is said of it."""
        rows_fit = self.batch_size is None or 1 <= self.batch_size < 2**31
        context_fits = self.max_context is None or self.max_context >= 2
        drafts = "needs a draft: not --draft none, not --speculate_k 0"
        return (
            (self.max_new_tokens < 1, f"--max_new_tokens {self.max_new_tokens} must be at least 1"),
            (not rows_fit, f"--batch_size {self.batch_size} must be in 1..2**31 - 1"),
            (self.n_sources > 1,
             "give one of --prompt, --prompt_file, --prompts and --interactive"),
            (self.check_lossless and not self.drafts, f"--check_lossless {drafts}"),
            (self.compare and not self.drafts, f"--compare {drafts}"),
            (self.draft_checkpoint_path and not self.drafts, f"--draft_checkpoint_path {drafts}"),
            (self.interactive and (self.compares or self.json or self.profile),
             "--interactive has no --compare, --check_lossless, --json or --profile"),
            (self.check_lossless and self.temperature > 0,
             "--check_lossless compares greedy outputs: no --temperature"),
            (self.check_lossless and not self.compares,
             "--check_lossless needs the plain run that --no-compare leaves out"),
            (not 0 <= self.seed < 2**63, f"--seed {self.seed} must be in 0..2**63 - 1"),
            (not context_fits, f"--max_context {self.max_context} must be at least 2"),
            (self.interactive and is_random(self.checkpoint_path),
             "--interactive needs a tokenizer, which random weights do not have"),
            (self.chat and not self.n_sources,
             "--chat needs a --prompt, --prompt_file, --prompts or --interactive"),
            (self.system is not None and not self.chat,
             "--system needs --chat: without a template there is no place for it"),
        )  # fmt: skip

    @property
    def n_sources(self) -> int:
        """How many kinds of prompts were given; 0: the demo's own are meant."""
        return sum(map(bool, (self.prompt, self.prompt_file, self.prompts, self.interactive)))

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted at all."""
        return self.draft != "none" and self.speculate_k != 0

    @property
    def compares(self) -> bool:
        """Whether plain decoding runs too: when asked for, and on the demo's prompts."""
        if self.compare is not None:
            return self.compare
        return self.check_lossless or (self.drafts and not self.n_sources)

    def strategies(self, gamma: int) -> list[Strategy]:
        """What the flags allow: one way to draft, or with --draft auto all that are possible.

        ValueError if none is. What a policy cannot reselect is then asked of the others only.
        """
        if not self.drafts:
            return [Strategy(gamma=gamma)]
        found, refusal, automatic = [], None, self.draft == "auto"
        for policy in AUTO_POLICIES if automatic else (self.draft,):
            reselects = policy in POLICIES and POLICIES[policy].reselect_every
            every = self.reselect_every if reselects or not automatic else None
            sizes = self.draft_budget, self.n_sink, self.obs_window
            try:
                found.append(Strategy(policy, gamma, *sizes, every))
            except ValueError as e:
                refusal = e
        if refusal and not (automatic and any(d.policy in POLICIES for d in found)):
            raise refusal
        return found


def parse_args(argv: list[str] | None) -> Options:
    """The flags of a command line; None: this process's own. ValueError for unusable ones."""
    p = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for f in fields(Options):
        kind = get_args(f.type)[0] if get_args(f.type) else f.type
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": "store_true" if f.default is False else argparse.BooleanOptionalAction}
        elif f.default == ():
            how["action"] = "append"
        p.add_argument(f"--{f.name}", *f.metadata["names"], **how | f.metadata["how"])
    given = vars(p.parse_args(argv))
    return Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def check_targets(o: Options) -> None:
    """ValueError for files and streams that cannot be used at the end of a run."""
    if sys.stdout is None or (o.interactive and sys.stdin is None):
        raise ValueError(
            "standard output must be open, and with --interactive standard input; for no output "
            "write > /dev/null"
        )
    if o.json == "":
        raise ValueError("--json needs the name of a file")
    targets = {"json": o.json and o.json != "-" and Path(o.json), "profile": o.profile}
    for name, path in targets.items():
        try:
            if path:
                check_writable(path)
        except OSError as e:
            raise ValueError(f"--{name}: cannot write {path}: {e.strerror}") from None
    if all(targets.values()) and len({path.resolve() for path in targets.values()}) == 1:
        raise ValueError(f"--json and --profile are the same file, {o.json}; give two")


def load(o: Options) -> tuple[Checkpoint, Engine, Auto | None, Request]:
    """Everything that bad input can break, the cheap things first: the weights come last."""
    sampling, device = Sampling(o.temperature, o.top_k, o.top_p), find_device(o.device)
    dtype = DTYPES[o.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    checkpoint, draft = open_checkpoint(o.checkpoint_path, o.chat), None
    end_ids = () if o.ignore_eos else checkpoint.end_ids(MAX_EOS)
    config = checkpoint.config
    longest = min(config.max_seq_len, o.max_context or config.max_seq_len)

    def check_size(n_rows: int, n_tokens: int) -> None:  # the engine asks again, for all it needs
        n_bytes = n_rows * n_tokens * kv_bytes_per_token(config, dtype.itemsize)
        remedy = "a smaller --batch_size or --max_context"
        check_fits(n_bytes, device, "the KV caches", lambda share: remedy)

    check_size(o.batch_size or 1, 1 + o.max_new_tokens)  # before rows are made
    rows = read_rows(o, checkpoint, longest)
    if not o.interactive:
        longest = max(map(len, rows)) + o.max_new_tokens
    check_size(len(rows), longest)
    automatic = o.drafts and "auto" in (o.draft, o.speculate_k)
    lengths = draft_lengths(device.type, config.n_group)
    gammas = lengths if o.speculate_k == "auto" else (o.speculate_k,)
    strategies = o.strategies(max(gammas))
    if o.draft_checkpoint_path:
        draft = open_checkpoint(o.draft_checkpoint_path)
        checkpoint.check_same_vocabulary(draft)
    if len(strategies) == 1:
        check_strategy(strategies[0], draft and draft.config, longest)
    compiling = o.compile and compiler_runs(device)
    if o.compile and not compiling:
        print("generate.py: no working compiler for torch.compile on this machine (the CPU needs "
              "g++): running eagerly, which is slower", file=sys.stderr)  # fmt: skip
    model, draft_model = (c and load_weights(c, device, dtype) for c in (checkpoint, draft))
    for m in filter(None, (model, draft_model)) if compiling else ():
        compile_blocks(m)
    request = Request(rows, o.max_new_tokens, end_ids, o.compares)
    if not automatic:
        engine = Engine(model, len(rows), longest, strategies[0], sampling, o.seed, draft_model)
        return checkpoint, engine, None, request
    engine = Engine(model, len(rows), longest, Strategy(), sampling, o.seed)
    named = "streaming" if o.draft == "auto" else o.draft
    found = [Candidate(d) for d in strategies if not draft_model or o.draft == "auto"]
    found += [Candidate(d, draft_model) for d in strategies if draft_model and d.policy == named]
    return checkpoint, engine, Auto(engine, found, gammas, named=o.draft != "auto"), request


def read_rows(o: Options, checkpoint: Checkpoint, max_context: int) -> list[list[int]]:
    """Token ids of every row; with --interactive, which has no prompts yet, empty ones."""
    longest, tokenizer = prompts.longest_prompt(max_context, o.max_new_tokens), checkpoint.tokenizer
    if o.interactive:
        return [[]] * (o.batch_size or 1)
    if not o.n_sources:
        n_rows = o.batch_size or prompts.DEMO_ROWS
        return prompts.demo_prompts(tokenizer, n_rows, min(prompts.DEMO_LONGEST, longest))
    encode = partial(checkpoint.encode, system=o.system)
    given = prompts.read_prompts(o.prompt, o.prompt_file, o.prompts, encode)
    prompts.check_lengths(given, max_context, o.max_new_tokens)
    return prompts.fill_rows(given, o.batch_size or len(given), tokenizer.vocab_size, o.seed)


def load_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Transformer:
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

    return checkpoint.load(device, dtype, on_tensor)


def describe(o: Options, engine: Engine, auto: Auto | None, rows: list[list[int]]) -> str:
    """What is about to run, in three lines."""
    n_params = sum(p.numel() for p in engine.model.parameters())
    lengths, s, dtype = [*map(len, rows)], engine.sampling, engine.full.spec.dtype
    how = "greedy" if s.greedy else f"temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}"
    draft = "no draft: plain decoding"
    if auto:
        what = ", ".join(map(str, auto.candidates))
        draft = f"auto: {what}; gamma of {', '.join(map(str, auto.gammas))}"
        draft += "" if auto.named else ", or no draft"
    elif engine.drafter:
        label = engine.drafter.label(f"draft model {o.draft_checkpoint_path}")
        draft = f"{label}, gamma {engine.gamma}"
    return (
        f"{o.checkpoint_path}: {n_params / 1e6:.1f}M parameters, {str(dtype)[6:]} on {o.device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
        f"{o.max_new_tokens} new ones each, {how}\n{draft}"
    )


def batch(
    o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, request: Request
) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    say = partial(print, file=sys.stderr if o.json == "-" else sys.stdout, flush=True)
    say(describe(o, engine, auto, request.prompts))
    tracer = torch.profiler.profile() if o.profile else None
    measured = measure(engine, auto, request, say, tracer)
    rows = zip(request.prompts, measured.main.outputs, strict=True)
    texts = [continuation(checkpoint.tokenizer, prompt, ids) for prompt, ids in rows]
    result = report.build(measured, texts, request.end_ids)
    try:
        say(f"\nrow 0 continues:\n{texts[0]}\n\n{report.table(result)}")
        if request.compare:
            say(report.verdict(result))
    finally:  # also where nobody reads standard output any more
        if o.json == "-":
            print(json.dumps(result, indent=2))
        elif o.json:
            write_json(result, Path(o.json))
        if tracer:
            save_trace(tracer, o.profile)
    return 1 if o.check_lossless and not result["identical"] else 0


def save_trace(tracer: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace. OSError if there is no room for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        tracer.export_chrome_trace(str(file))  # which does not say if it could not
        if not file.is_file():
            raise OSError(f"{path}: the trace does not fit into {tempfile.gettempdir()}")
        write_file(file.read_bytes(), path)


def converse(
    o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, request: Request
) -> int:
    """Answer one prompt after another from standard input, until it ends.

    With a chat template it is one conversation: its K and V stay in the cache, and of every turn
    only what is new is read. Otherwise every prompt stands for itself.
    """
    rows, longest = len(request.prompts), engine.max_len - o.max_new_tokens
    warm_up(engine, auto, later_turns=o.chat)
    so_far: list[int] = []  # the conversation
    while True:
        try:
            text = input("\nprompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        try:
            prompt = checkpoint.encode(text, o.system, so_far)
        except ValueError as e:
            print(e)
            continue
        if so_far and len(prompt) > longest:
            print(f"the conversation would have {len(prompt)} tokens, of at most {longest}; "
                  "it begins anew with what you say next")  # fmt: skip
            so_far = []
        elif not 1 <= len(prompt) <= longest:
            print(f"a prompt needs 1 to {longest} tokens; this one has {len(prompt)}")
        else:
            turn = replace(request, prompts=[prompt] * rows)
            answer = say_answer(checkpoint.tokenizer, engine, auto, turn, bool(so_far))
            if o.chat:
                so_far = prompt + (answer[:-1] if answer[-1] in request.end_ids else answer)


def say_answer(
    tokenizer: Tokenizer, engine: Engine, auto: Auto | None, turn: Request, reuse: bool
) -> list[int]:
    """Decode a turn, printing its first row as it is decided; that row's new tokens.

    For what it prints it waits for every round.
    """
    prompt, limits = turn.prompts[0], [turn.max_new_tokens] * len(turn.prompts)
    n_reused = engine.batch.n_reused(0, prompt) if reuse else 0
    engine.prefill(turn.prompts, limits, turn.end_ids, reuse=reuse)
    stream, done = TextStream(tokenizer, prompt), len(prompt)

    def show() -> None:
        nonlocal done
        end = int(engine.batch.seq_len[0])
        ids = engine.batch.tokens[0, done:end].tolist()
        print(stream.feed([i for i in ids if i not in turn.end_ids]), end="", flush=True)
        done = end

    show()
    work = partial(auto.decode, show) if auto else partial(decode, engine, on_round=show)
    seconds, stats = timed(engine.device, work)
    print(stream.close())
    print(
        f"[{stats.decoded_tokens / seconds:.1f} tokens/s, mean acceptance length "
        f"{stats.mean_acceptance_length:.2f}; of {len(prompt)} tokens of prompt "
        f"{n_reused} were in the cache]",
        file=sys.stderr,
    )
    return engine.batch.outputs()[0]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        prepare_streams()
        with torch.inference_mode():
            options = parse_args(argv)
            check_targets(options)
            run = converse if options.interactive else batch
            return run(options, *load(options))
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
