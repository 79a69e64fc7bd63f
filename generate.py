"""The command line: prompts in, text and numbers out.

    python generate.py                        # the demo: 16 long prompts, every way to draft
    python generate.py --explain              # the next rounds of a row, as text
    python generate.py --checkpoint_path DIR --prompt_file book.txt --max_new_tokens 512 --compare

The flags are in `options.py`. `load` makes all that a run needs, the cheap things first. Then
`batch` decodes one batch and says what came of it (`measure.py`, `report.py`), or `converse`
answers line by line, or `demo`, or `explain`. With --output, `serve` takes any number of prompts
through the rows.

What a user can get wrong ends in one line on standard error and exit status 2.
"""

import io
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs


def interrupted(*_: object) -> None:
    """Ends the process, with the line and the status that `main` has for it."""
    if os.environ.get("RANK", "0") == "0":  # all ranks are interrupted
        os.write(2, b"\ngenerate.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)  # the imports take seconds; `main` puts it back

import torch
from torch.distributed import Store

import report
from auto import Auto
from checkpoint import Checkpoint
from data_parallel import supervise, supervised
from demo import demo
from device import first_rank, timed
from explain import explain
from files import write_file
from load import describe, how, load
from measure import Job, decode, measure, warm_up
from offline import BadLines
from options import Options, check_targets, parse_args, write_result
from parallel import as_one, join, launched, own_device
from serve import serve
from spec_decode import Engine
from tokenizer import TextStream, Tokenizer, continuation


def batch(o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, job: Job) -> int:
    """One batch from prompts to numbers. Returns the exit status."""
    say = partial(print, file=sys.stderr if o.json == "-" else sys.stdout, flush=True)
    lengths = [*map(len, job.prompts)]
    what = f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
    what += f"{o.max_new_tokens} new ones each, {how(engine.sampling)}"
    say(describe(o, engine, auto, what))
    tracer = torch.profiler.profile() if o.profile else None
    measured = measure(engine, auto, job, say, tracer)
    rows = zip(job.prompts, measured.main.outputs, strict=True)
    texts = [continuation(checkpoint.tokenizer, prompt, ids) for prompt, ids in rows]
    result = report.build(measured, texts, job.end_ids)
    try:
        say(f"\nrow 0 continues:\n{texts[0]}\n\n{report.table(result)}")
        if job.compare:
            say(report.verdict(result))
    finally:  # also where nobody reads standard output any more
        write_result(o, result)
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
    o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, job: Job
) -> int:
    """Answer one prompt after another from standard input, until it ends.

    With a chat template it is one conversation: its K and V stay in the cache, and of every turn
    only what is new is read. Otherwise every prompt stands for itself.
    """
    rows, longest = len(job.prompts), engine.max_len - o.max_new_tokens
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
            turn = replace(job, prompts=[prompt] * rows)
            answer = say_answer(checkpoint.tokenizer, engine, auto, turn, bool(so_far))
            if o.chat:
                so_far = prompt + (answer[:-1] if answer[-1] in job.end_ids else answer)


def say_answer(
    tokenizer: Tokenizer, engine: Engine, auto: Auto | None, turn: Job, reuse: bool
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
    try:
        return command(argv)
    except (ValueError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as e:
        return failed(e)


def command(argv: list[str] | None = None, store: Store | None = None) -> int:
    """The same; raises what is wrong. `store` is where the ranks of one model meet."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    forgive_streams()
    with torch.inference_mode():
        options = parse_args(argv, __doc__.split("\n")[0])
        if store and options.data_parallel and not supervised():
            return supervise(store)
        if store:
            options = of_this_rank(options, store)
        check_targets(options)
        if options.output:
            return serve(options)
        return one_batch(options)(options, *load(options))


def one_batch(o: Options) -> Callable[..., int]:
    """What is done with one batch."""
    if o.interactive:
        return converse
    return explain if o.explain else demo if o.is_demo else batch


def of_this_rank(o: Options, store: Store) -> Options:
    """The flags as this one of several ranks has them, which meet here. ValueError for some."""
    if o.interactive:
        raise ValueError("--interactive is for one process: torchrun has no terminal for its ranks")
    o = replace(o, device=own_device(o.device))
    if o.data_parallel:
        return o if os.environ["RANK"] == "0" else replace(o, json=None)
    join(o.device, store)
    return o if first_rank() else replace(o, json=None, profile=None)


def forgive_streams() -> None:
    """What is read is checked where it is encoded; what a terminal cannot show, it shows escaped.

    So neither ends the program.
    """
    if sys.stderr is None:  # else print() takes standard output for it
        sys.stderr = io.StringIO()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def failed(e: BaseException) -> int:
    """Say in one line what ended the program; returns the exit status."""
    if isinstance(e, KeyboardInterrupt):  # which may say how far it came
        print(f"\ngenerate.py: interrupted{e}", file=sys.stderr)
        return 130
    if isinstance(e, (ValueError, OSError, MemoryError, RuntimeError)):
        return refused(e)
    raise e


def refused(e: Exception) -> int:
    """Say in one line what was wrong; returns the exit status. Raises what is our own mistake."""
    text = str(e) if isinstance(e, BadLines) else " ".join(str(e).split())
    on_the_cpu = ("can't allocate memory", "not enough memory")
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
    sys.exit(as_one(partial(command, None), failed) if launched() else main())
