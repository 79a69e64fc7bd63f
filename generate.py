"""The command line: prompts in, text and numbers out.

    python generate.py                        # the demo: 16 long prompts, plain and speculative
    python generate.py --checkpoint_path DIR --prompt_file book.txt --max_new_tokens 512 --compare

The flags are in `options.py`. `load` makes all that a run needs, the cheap things first. Then
`batch` decodes one batch and says what came of it (`measure.py`, `report.py`), or `converse`
answers line by line.

What a user can get wrong ends in one line on standard error and exit status 2.
"""

import io
import json
import os
import signal
import sys
import tempfile
import warnings
from dataclasses import replace
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

import prompts
import report
from auto import Auto, Candidate, draft_lengths
from batch import MAX_EOS
from checkpoint import DTYPES, Checkpoint, open_checkpoint, write_file, write_json
from config import kv_bytes
from device import check_fits, find_device, timed
from drafters import check_strategy
from kernels import compile_blocks, compiler_runs
from measure import Progress, Request, decode, measure, warm_up
from model import Transformer
from options import Options, check_targets, parse_args
from policies import Strategy
from sampling import Sampling
from spec_decode import Engine
from tokenizer import TextStream, Tokenizer, continuation

LARGE = 10**9  # bytes of weights from which loading is worth a line


def load(o: Options) -> tuple[Checkpoint, Engine, Auto | None, Request]:
    """Everything that bad input can break, the cheap things first: the weights come last."""
    sampling, device = Sampling(o.temperature, o.top_k, o.top_p), find_device(o.device)
    dtype = DTYPES[o.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    checkpoint, draft = open_checkpoint(o.checkpoint_path, o.chat), None
    end_ids = () if o.ignore_eos else checkpoint.end_ids(MAX_EOS)
    config = checkpoint.config
    longest = min(config.max_seq_len, o.max_context or config.max_seq_len)

    def check_size(n_rows: int, n_tokens: int) -> None:  # the engine asks again, for all it needs
        n_bytes = n_rows * kv_bytes(config, n_tokens, dtype.itemsize)
        remedy = "a smaller --batch_size or --max_context"
        check_fits(n_bytes, device, "the KV caches", lambda share: remedy)

    check_size(o.batch_size or 1, min(1 + o.max_new_tokens, longest))  # before rows are made
    rows = read_rows(o, checkpoint, longest)
    if not o.interactive:
        longest = max(map(len, rows)) + o.max_new_tokens
    check_size(len(rows), longest)
    automatic = o.drafts and "auto" in (o.draft, o.speculate_k)
    gammas = o.gammas(draft_lengths(device.type, config.n_group))
    strategies = o.strategies(max(gammas))
    if o.draft_checkpoint_path:
        draft = open_checkpoint(o.draft_checkpoint_path)
        checkpoint.check_same_vocabulary(draft)
    if len(strategies) == 1:
        check_strategy(strategies[0], draft.config if draft else None, longest)
    compiling = o.compile and compiler_runs(device)
    if o.compile and not compiling:
        print("generate.py: no working compiler for torch.compile on this machine (the CPU needs "
              "g++): running eagerly, which is slower", file=sys.stderr)  # fmt: skip
    model = load_weights(checkpoint, device, dtype, compiling)
    draft_model = load_weights(draft, device, dtype, compiling) if draft else None
    request = Request(rows, o.max_new_tokens, end_ids, o.compares)
    if not automatic:
        engine = Engine(model, len(rows), longest, strategies[0], sampling, o.seed, draft_model)
        return checkpoint, engine, None, request
    engine = Engine(model, len(rows), longest, Strategy(), sampling, o.seed)
    named = "streaming" if o.draft == "auto" else o.draft
    candidates = [Candidate(d) for d in strategies if not draft_model or o.draft == "auto"]
    if draft_model:
        candidates += [Candidate(d, draft_model) for d in strategies if d.policy == named]
    auto = Auto(engine, candidates, gammas, named=o.draft != "auto")
    return checkpoint, engine, auto, request


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


def load_weights(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, compiling: bool
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

    model = checkpoint.load(device, dtype, on_tensor)
    if compiling:
        compile_blocks(model)
    return model


def describe(o: Options, engine: Engine, auto: Auto | None, rows: list[list[int]]) -> str:
    """What is about to run, in three lines."""
    n_params = sum(p.numel() for p in engine.model.parameters())
    lengths, s = [*map(len, rows)], engine.sampling
    dtype = str(engine.full.spec.dtype).removeprefix("torch.")
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
        f"{o.checkpoint_path}: {n_params / 1e6:.1f}M parameters, {dtype} on {o.device}, "
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
        if tracer and o.profile:
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
    warm_up(engine, auto, refills=o.chat)
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
    n_reused = engine.batch.in_common(prompt)[0] if reuse else 0
    engine.prefill(turn.prompts, limits, turn.end_ids, reuse=reuse)
    stream, done = TextStream(tokenizer, prompt), len(prompt)

    def show() -> None:
        nonlocal done
        end = int(engine.batch.seq_len[0])
        ids = engine.batch.tokens[0, done:end].tolist()
        print(stream.feed([i for i in ids if i not in turn.end_ids]), end="", flush=True)
        done = end

    show()
    work = partial(decode, engine, auto=auto, on_round=show)
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
        forgive_streams()
        with torch.inference_mode():
            options = parse_args(argv, __doc__.split("\n")[0])
            check_targets(options)
            run = converse if options.interactive else batch
            return run(options, *load(options))
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        return refused(e)
    except KeyboardInterrupt:
        print("\ngenerate.py: interrupted", file=sys.stderr)
        return 130


def forgive_streams() -> None:
    """What is read is checked where it is encoded; what a terminal cannot show, it shows escaped.

    So neither ends the program.
    """
    if sys.stderr is None:  # else print() takes standard output for it
        sys.stderr = io.StringIO()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def refused(e: Exception) -> int:
    """Say in one line what was wrong; returns the exit status. Raises what is our own mistake."""
    text, on_the_cpu = " ".join(str(e).split()), ("can't allocate memory", "not enough memory")
    if isinstance(e, (MemoryError, RuntimeError)):
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in text for words in on_the_cpu):
            raise e
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
