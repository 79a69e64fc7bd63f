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
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs


def interrupted(*_: object) -> None:
    """Ends the process, with the line and the status that `main` has for it."""
    os.write(2, b"\ngenerate.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)  # the imports take seconds; `main` puts it back

import torch

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
from config import ModelConfig, is_random, kv_bytes_per_token
from cost_model import Parser
from device import check_fits, compiler_runs, find_device, timed
from drafters import check_strategy
from measure import Progress, Request, Run, decode, measure, warm_up
from model import Transformer, compile_blocks
from policies import POLICIES, Strategy
from prompts import (
    DEMO_LONGEST,
    DEMO_ROWS,
    check_lengths,
    demo_prompts,
    fill_rows,
    longest_prompt,
    read_prompts,
)
from sampling import Sampling
from spec_decode import Engine
from tokenizer import TextStream, Tokenizer, continuation

AUTO_POLICIES = ("ngram", "streaming", "snapkv")  # what --draft auto chooses from
LARGE = 10**9  # bytes of weights from which loading is worth a line


def int_or_auto(text: str) -> int | str:
    """A number of drafts, or the word."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor auto") from None


def flag(default: object, meaning: str | None = None, *names: str, **how: Any) -> Any:
    """A field of Options that is a flag: its default, its help, other names, and how to parse it.

    Without another word a flag is parsed as what its default is.
    """
    how = how if {"type", "action"} & how.keys() else how | {"type": type(default)}
    return field(default=default, metadata={"names": names, "how": how | {"help": meaning}})


@dataclass(frozen=True, slots=True)
class Options:
    """The flags. ValueError for values and combinations that make no sense."""

    checkpoint_path: Path = flag(
        DEMO_CHECKPOINT,
        "Hugging Face directory; random:llama-3.1-8b: random weights of that geometry", type=Path,
    )  # fmt: skip
    draft_checkpoint_path: Path | None = flag(
        None, "draft with this smaller model of its own", type=Path
    )
    prompt: tuple[str, ...] = flag(
        (), "text; an integer N: N random tokens, different ones in every row", action="append"
    )
    prompt_file: tuple[Path, ...] = flag((), "UTF-8 text (repeatable)", action="append", type=Path)
    prompts: Path | None = flag(None, '.jsonl, an object with "prompt" per line', type=Path)
    batch_size: int | None = flag(None, "rows; prompts are repeated to fill them", type=int)
    max_new_tokens: int = flag(256, "per row")
    max_context: int | None = flag(
        None, "most tokens of prompt and answer; default: the model's own", type=int, metavar="N"
    )
    temperature: float = flag(Sampling().temperature, "0: greedy")
    top_k: int | None = flag(Sampling().top_k, type=int)
    top_p: float | None = flag(Sampling().top_p, type=float)
    seed: int = flag(1234)
    ignore_eos: bool = flag(False, "go on to the limit", action="store_true")
    draft: str = flag(
        "auto",
        f"how to draft: auto, none, ngram, {', '.join(POLICIES)}; with --draft_checkpoint_path "
        f"also full",
    )
    speculate_k: int | str = flag(
        "auto", "draft tokens per round; 0: plain decoding", "--gamma",
        type=int_or_auto, metavar="N|auto",
    )  # fmt: skip
    draft_budget: int = flag(
        Strategy().budget, "tokens of KV that the draft reads per row, sinks included"
    )
    n_sink: int = flag(Strategy().n_sink, "of them, the first ones of the text")
    obs_window: int | None = flag(
        Strategy().obs_window,
        "newest tokens that are observed; default: the policy's own", type=int,
    )  # fmt: skip
    reselect_every: int | None = flag(
        Strategy().reselect_every,
        "how often to select the draft's KV again; 0: never", type=int, metavar="ROUNDS",
    )  # fmt: skip
    compare: bool | None = flag(
        None, "run plain decoding too", action=argparse.BooleanOptionalAction
    )
    check_lossless: bool = flag(False, "compare, and exit 1 on a difference", action="store_true")
    compile: bool = flag(True, action=argparse.BooleanOptionalAction)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu")
    dtype: str | None = flag(
        None, "default: float32 on the CPU, bfloat16 on a GPU", type=str, choices=DTYPES
    )
    profile: Path | None = flag(
        None, "write a Chrome trace of the decoding", type=Path, metavar="FILE"
    )
    chat: bool = flag(False, "put prompts into the checkpoint's chat template", action="store_true")
    system: str | None = flag(None, "with --chat: the system message", type=str, metavar="TEXT")
    interactive: bool = flag(
        False, "prompts from standard input; with --chat, a conversation", action="store_true"
    )
    json: str | None = flag(
        None, "write the numbers and outputs; -: standard output", type=str, metavar="FILE"
    )

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
    def automatic(self) -> bool:
        """Whether there is something left to decide."""
        return self.drafts and "auto" in (self.draft, self.speculate_k)

    @property
    def compares(self) -> bool:
        """Whether plain decoding runs too: when asked for, and on the demo's prompts."""
        if self.compare is not None:
            return self.compare
        return self.check_lossless or (self.drafts and not self.n_sources)

    def gammas(self, device_type: str, n_group: int) -> tuple[int, ...]:
        """Draft lengths that may be used; n_group is G, the target's heads per KV head."""
        if self.speculate_k == "auto":
            return draft_lengths(device_type, n_group)
        return (self.speculate_k,)

    def strategy(self, policy: str, gamma: int) -> Strategy:
        """This way to draft with the flags' values. ValueError if they do not go together."""
        optional = self.draft == "auto"  # what a policy cannot do is then asked of the others only
        reselects = policy in POLICIES and POLICIES[policy].reselect_every
        every = None if optional and not reselects else self.reselect_every
        return Strategy(policy, gamma, self.draft_budget, self.n_sink, self.obs_window, every)


def parse_args(argv: list[str] | None) -> Options:
    """The flags of a command line (None: this process's own). ValueError for unusable ones."""
    p = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for f in fields(Options):
        p.add_argument(f"--{f.name}", *f.metadata["names"], **f.metadata["how"])
    given = vars(p.parse_args(argv))
    return Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def check_targets(o: Options) -> None:
    """ValueError for files and streams that cannot be used at the end of a run."""
    if sys.stdout is None or (o.interactive and sys.stdin is None):
        raise ValueError(
            "standard output must be open, and with --interactive standard input; for no output "
            "write > /dev/null"
        )
    targets = []
    for flag, path in (("json", o.json), ("profile", o.profile)):
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
        raise ValueError(f"--json and --profile are the same file, {o.json}; give two")


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that a run needs."""

    checkpoint: Checkpoint
    engine: Engine
    auto: Auto | None  # what decides how to draft, if anything is left to decide
    request: Request


def load(o: Options) -> Loaded:
    """Everything that bad input can break, the cheap things first: the weights come last."""
    sampling, device = Sampling(o.temperature, o.top_k, o.top_p), find_device(o.device)
    dtype = DTYPES[o.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    checkpoint, draft = open_checkpoint(o.checkpoint_path, o.chat), None
    end_ids = () if o.ignore_eos else read_end_ids(checkpoint)
    config = checkpoint.config
    longest = min(config.max_seq_len, o.max_context or config.max_seq_len)
    prompts = read_rows(o, checkpoint, longest, partial(check_rows, config, device, dtype))
    if not o.interactive:
        longest = max(map(len, prompts)) + o.max_new_tokens
    gammas = o.gammas(device.type, config.n_group)
    strategies = read_strategies(o, max(gammas))
    if o.draft_checkpoint_path:
        draft = open_checkpoint(o.draft_checkpoint_path)
        checkpoint.check_same_vocabulary(draft)
    if len(strategies) == 1:
        check_strategy(strategies[0], draft and draft.config, longest)
    compiling = o.compile and compiler_runs(device)
    if o.compile and not compiling:
        print(
            "generate.py: no working compiler for torch.compile on this machine (the CPU needs "
            "g++): running eagerly, which is slower",
            file=sys.stderr,
        )
    model, draft_model = (c and load_weights(c, device, dtype) for c in (checkpoint, draft))
    for m in filter(None, (model, draft_model)) if compiling else ():
        compile_blocks(m)
    size, request = (len(prompts), longest), Request(prompts, o.max_new_tokens, end_ids, o.compares)
    if not o.automatic:
        engine = Engine(model, *size, strategies[0], sampling, o.seed, draft_model)
        return Loaded(checkpoint, engine, None, request)
    engine = Engine(model, *size, Strategy(), sampling, o.seed)
    named = "streaming" if o.draft == "auto" else o.draft
    found = [Candidate(d) for d in strategies if not draft_model or o.draft == "auto"]
    found += [Candidate(d, draft_model) for d in strategies if draft_model and d.policy == named]
    auto = Auto(engine, found, gammas, named=o.draft != "auto")
    return Loaded(checkpoint, engine, auto, request)


def read_end_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text. ValueError if they are more than an engine takes."""
    ids = checkpoint.end_ids()
    if len(ids) > MAX_EOS:
        raise ValueError(
            f"{checkpoint.path}: {len(ids)} tokens end a text (eos_token_id); at most {MAX_EOS} "
            f"are possible"
        )
    return ids


def read_rows(
    o: Options,
    checkpoint: Checkpoint,
    max_context: int,  # tokens
    check_size: Callable[[int, int], None],
) -> list[list[int]]:
    """Token ids of every row of the batch; with --interactive, which has none yet, empty ones.

    `check_size` is told the rows and the tokens of the longest, answer included, before rows are
    made, and raises ValueError if they cannot fit.
    """
    longest = longest_prompt(max_context, o.max_new_tokens)
    if o.interactive:
        n_rows = o.batch_size or 1
        check_size(n_rows, max_context)
        return [[]] * n_rows
    if not o.n_sources:
        n_rows, longest = o.batch_size or DEMO_ROWS, min(DEMO_LONGEST, longest)
        check_size(n_rows, longest + o.max_new_tokens)
        return demo_prompts(checkpoint.tokenizer, n_rows, longest)
    encode = partial(checkpoint.encode, system=o.system)
    prompts = read_prompts(o.prompt, o.prompt_file, o.prompts, encode)
    longest = check_lengths(prompts, max_context, o.max_new_tokens)
    n_rows = o.batch_size or len(prompts)
    check_size(n_rows, longest + o.max_new_tokens)
    return fill_rows(prompts, n_rows, checkpoint.tokenizer.vocab_size, o.seed)


def check_rows(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, n_rows: int, n_tokens: int
) -> None:
    """ValueError if the K and V of these rows and tokens alone are too much for the device.

    The engine asks again, for all that it needs. Until then nothing may be made for every row.
    """
    n_bytes = n_rows * n_tokens * kv_bytes_per_token(config, dtype.itemsize)
    remedy = "a smaller --batch_size or --max_context"
    check_fits(n_bytes, device, "the KV caches", lambda share: remedy)


def read_strategies(o: Options, gamma: int) -> list[Strategy]:
    """What the flags allow: one way to draft, or with --draft auto several."""
    if not o.drafts:
        return [Strategy(gamma=gamma)]
    if o.draft != "auto":
        return [o.strategy(o.draft, gamma)]
    found, refusal = [], None
    for policy in AUTO_POLICIES:
        try:
            found.append(o.strategy(policy, gamma))
        except ValueError as e:
            refusal = e
    if not any(d.policy in POLICIES for d in found):
        raise refusal
    return found


def say_on(out: TextIO | None) -> Callable[..., None]:
    """Printing to this stream at once."""
    return partial(print, file=out, flush=True)


def load_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model; of a large one, standard error tells how far it is."""
    say = say_on(sys.stderr)
    progress = Progress(say)

    def on_tensor(done: int, total: int) -> None:
        if total >= LARGE:
            if not done:
                say(f"loading {checkpoint.path}: {total / 1e9:.1f} GB", end=" ... ")
            progress(done, total)
            if done == total:
                say("")

    return checkpoint.load(device, dtype, on_tensor)


def describe(o: Options, loaded: Loaded) -> str:
    """What is about to run, in three lines."""
    engine, auto, model = loaded.engine, loaded.auto, loaded.engine.model
    n_params = sum(p.numel() for p in model.parameters())
    lengths, s, spec = [*map(len, loaded.request.prompts)], engine.sampling, engine.full.spec
    how = "greedy" if s.greedy else f"temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}"
    draft = "no draft: plain decoding"
    if auto:
        what = ", ".join(map(str, auto.candidates))
        draft = f"auto: {what}; gamma of {', '.join(map(str, auto.gammas))}"
        draft += "" if auto.named else ", or no draft"
    elif engine.drafter:
        draft = describe_draft(o.draft_checkpoint_path, engine)
    dtype = str(spec.dtype).removeprefix("torch.")
    return (
        f"{o.checkpoint_path}: {n_params / 1e6:.1f}M parameters, {dtype} on {o.device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
        f"{o.max_new_tokens} new ones each, {how}\n{draft}"
    )


def describe_draft(draft_dir: Path | None, engine: Engine) -> str:
    """Who drafts, from what, and how far."""
    return f"{engine.drafter.label(f'draft model {draft_dir}')}, gamma {engine.gamma}"


def batch(o: Options, loaded: Loaded) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    say, request = say_on(sys.stderr if o.json == "-" else sys.stdout), loaded.request
    say(describe(o, loaded))
    tracer = torch.profiler.profile() if o.profile else None
    measured = measure(loaded.engine, loaded.auto, request, say, tracer)
    rows = zip(request.prompts, measured.main.outputs, strict=True)
    texts = [continuation(loaded.checkpoint.tokenizer, prompt, ids) for prompt, ids in rows]
    result = report.build(measured, texts, request.end_ids)
    try:
        say("\nrow 0 continues:\n" + texts[0])
        say("\n" + report.table(result))
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


class RowPrinter:
    """Prints the first row's text as it is decided, for which it waits for every round."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.engine = engine
        self.text = TextStream(tokenizer, prompt)
        self.done = len(prompt)

    def __call__(self) -> None:
        end = self.engine.batch.seq_len[0].item()
        ids, eos = (
            self.engine.batch.tokens[0, self.done : end].tolist(),
            self.engine.batch.eos.tolist(),
        )
        print(self.text.feed([i for i in ids if i not in eos]), end="", flush=True)
        self.done = end


def converse(o: Options, loaded: Loaded) -> int:
    """Answer one prompt after another from standard input, until it ends.

    With a chat template it is one conversation: its K and V stay in the cache, and of every turn
    only what is new is read. Otherwise every prompt stands for itself.
    """
    engine, auto, checkpoint = loaded.engine, loaded.auto, loaded.checkpoint
    rows, end_ids = len(loaded.request.prompts), loaded.request.end_ids
    longest = engine.max_len - o.max_new_tokens
    warm_up(engine, auto, later_turns=o.chat)
    so_far: list[int] = []  # the conversation
    while True:
        try:
            text = input("\nprompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        try:
            prompt = encode_turn(text, o.system, checkpoint, so_far)
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
        n_reused = engine.batch.n_reused(0, prompt) if so_far else 0
        engine.prefill([prompt] * rows, [o.max_new_tokens] * rows, end_ids, reuse=bool(so_far))
        answer = say_answer(
            engine, auto, RowPrinter(engine, checkpoint.tokenizer, prompt), n_reused
        )
        if o.chat:
            so_far = prompt + (answer[:-1] if answer[-1] in end_ids else answer)


def say_answer(engine: Engine, auto: Auto | None, show: "RowPrinter", n_reused: int) -> list[int]:
    """Decode the prefilled batch, printing its first row as it comes; that row's new tokens."""
    n_prompt = show.done
    show()
    work = partial(auto.decode, show) if auto else partial(decode, engine, on_round=show)
    seconds, stats = timed(engine.device, work)
    run = Run(stats, engine.batch.outputs(), seconds)
    print(show.text.close())
    print(
        f"[{run.tokens_per_second:.1f} tokens/s, mean acceptance length "
        f"{stats.mean_acceptance_length:.2f}; of {n_prompt} tokens of prompt "
        f"{n_reused} were in the cache]",
        file=sys.stderr,
    )
    return run.outputs[0]


def encode_turn(
    text: str, system: str | None, checkpoint: Checkpoint, so_far: list[int]
) -> list[int]:
    """Tokens of all that the model reads for this line; ValueError if it is no text."""
    if checkpoint.chat and text and so_far:
        return so_far + checkpoint.chat.reply(text)
    return checkpoint.encode(text, system)


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
            return run(options, load(options))
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
