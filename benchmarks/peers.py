"""Plain decoding of this program beside other programs: one model, one sitting, one table.

    python3 -m venv ../peers
    ../peers/bin/pip install -r requirements.txt transformers gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON" ../peers/bin/pip install llama-cpp-python  # some minutes
    ../peers/bin/python benchmarks/peers.py          # needs 16 GB of memory
    ../peers/bin/python benchmarks/peers.py --smoke  # tiny sizes, nothing compiled: does it run?

An environment of its own, because this program needs none of the others. llama.cpp is compiled for
this machine and wants a C++ compiler and cmake, which `pip install cmake` has.

Every program decodes the demo checkpoint greedily in float32 on the CPU, with as many threads as
torch has: rows of one length, the beginnings of standard modules. The first new token belongs to
the prefill, which is not counted; a step is one token of every row, with speculation one round.

transformers     `generate`, as it is by default, and compiled with its static cache
gpt-fast style   `gpt_fast.py`; both also *unfused*, without PyTorch's kernel for attention
llama.cpp        a sequence per row and one token of each per batch, with and without flash
                 attention; K and V in float32 as all others have them, and in float16, its default

Each program runs in a process of its own, so that neither threads nor a crash of one touches
another, and has a sweep of the whole text before the timed ones, which it may compile in. They
take turns, sweep by sweep, because shared machines drift. A program that is not installed, or
fails, is a line that says so. *Identical* are rows whose new tokens are all those of this program's
plain decoding; in float32 rounding differs, and two logits may be nearly equal.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpt_fast import GptFast
from benchmarks.llama import LlamaCpp
from benchmarks.saving import save, table
from checkpoint import DEMO_CHECKPOINT, load_model, load_tokenizer
from device import machine
from families import load_config
from kernels import compile_blocks
from measure import decode
from model import Transformer
from policies import Strategy
from prompts import check_lengths, demo_prompts
from sampling import Sampling
from spec_decode import Engine

CPU = torch.device("cpu")
GAMMA = 5  # drafts per round of the speculative line
PACKAGES = ("transformers", "llama_cpp_python", "gguf")


@dataclass(frozen=True, slots=True)
class Task:
    """What every program decodes."""

    prompts: tuple[tuple[int, ...], ...]  # token ids, of one length
    new_tokens: int  # of every row, at least 2
    compiled: bool

    @property
    def n_prompt(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])

    @property
    def length(self) -> int:
        """Tokens of each row at the end."""
        return self.n_prompt + self.new_tokens


class Sweep(NamedTuple):
    """One decoding from the prefill to the end."""

    seconds: list[float]  # of each step
    outputs: list[list[int]]  # new tokens of each row


Program = Callable[[Task], Callable[[], Sweep]]  # gets ready, and returns what decodes


def load() -> Transformer:
    """The demo's model."""
    return load_model(DEMO_CHECKPOINT, CPU, torch.float32)


def this_program(task: Task, gamma: int = 0) -> Callable[[], Sweep]:
    """The engine, plain or speculating with its default draft."""
    model, B = load(), len(task.prompts)
    if task.compiled:
        compile_blocks(model)
    strategy = Strategy("streaming", gamma) if gamma else Strategy()
    engine = Engine(model, B, task.length, strategy, Sampling())
    engine.warm_up()
    engine.prefill([*map(list, task.prompts)], [task.new_tokens] * B)

    def sweep() -> Sweep:
        engine.rewind()
        at = [time.perf_counter()]
        decode(engine, on_round=lambda: at.append(time.perf_counter()))
        return Sweep(differences(at), engine.batch.outputs())

    return sweep


def differences(at: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(at)]


def stepped(task: Task, first: list[int], step: Callable[[list[int], int], list[int]]) -> Sweep:
    """Feed each step's tokens, one per row, to the next. A step is also told their position."""
    tokens, at = [first], [time.perf_counter()]
    for pos in range(task.n_prompt, task.length - 1):
        tokens.append(step(tokens[-1], pos))
        at.append(time.perf_counter())
    return Sweep(differences(at), [list(row) for row in zip(*tokens, strict=True)])


def gpt_fast(task: Task, fused: bool) -> Callable[[], Sweep]:
    """See `gpt_fast.py`."""
    decoder = GptFast(load(), len(task.prompts), task.length, fused, task.compiled)
    first = decoder.prefill(torch.tensor(task.prompts)).tolist()
    return lambda: stepped(
        task, first, lambda tokens, pos: decoder.decode_one(torch.tensor(tokens), pos).tolist()
    )


class Clock:
    """A streamer of `generate` that reads the clock when it is handed the tokens of a step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompts, then with a token of every row."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Called when all is done."""


def transformers(task: Task, static: bool, attention: str = "sdpa") -> Callable[[], Sweep]:
    """`generate`, which reads the prompts again in every sweep."""
    from transformers import AutoModelForCausalLM, CompileConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_CHECKPOINT, dtype=torch.float32, attn_implementation=attention
    )
    model.generation_config.eos_token_id = None
    ids = torch.tensor(task.prompts)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    if static:
        compiling = CompileConfig(mode="default")
        compiling._compile_all_devices = task.compiled  # by itself it compiles on GPUs only
        how |= {"cache_implementation": "static", "compile_config": compiling}

    def sweep() -> Sweep:
        clock = Clock()
        tokens = model.generate(ids, max_new_tokens=task.new_tokens, streamer=clock, **how)
        return Sweep(differences(clock.at[1:]), tokens[:, task.n_prompt :].tolist())

    return sweep


def llama_cpp(task: Task, kv: str, flash: bool) -> Callable[[], Sweep]:
    """llama.cpp through its C functions; K and V are F32 or F16."""
    peer = LlamaCpp(load(), len(task.prompts), task.length, kv, flash)
    first = [peer.prefill(*row) for row in enumerate(task.prompts)]

    def step(tokens: list[int], pos: int) -> list[int]:
        return peer.next_tokens({row: [token] for row, token in enumerate(tokens)}, pos)

    def sweep() -> Sweep:
        for row in range(len(first)):
            peer.rewind(row, task.n_prompt)
        return stepped(task, first, step)

    return sweep


OURS = "this program"
PROGRAMS: dict[str, Program] = {
    OURS: this_program,
    f"this program, streaming, gamma {GAMMA}": partial(this_program, gamma=GAMMA),
    "transformers": partial(transformers, static=False),
    "transformers, static cache, compiled": partial(transformers, static=True),
    "transformers, the same, unfused": partial(transformers, static=True, attention="eager"),
    "gpt-fast style": partial(gpt_fast, fused=True),
    "gpt-fast style, unfused": partial(gpt_fast, fused=False),
} | {
    f"llama.cpp, {kv} KV{', flash attention' * flash}": partial(llama_cpp, kv=kv, flash=flash)
    for kv in ("F32", "F16")
    for flash in (False, True)
}


@cache
def ready(name: str, task: Task) -> Callable[[], Sweep]:
    """The program of this process, prefilled."""
    return PROGRAMS[name](task)


def run(name: str, task: Task) -> Sweep:
    """A sweep. RuntimeError, in one line, for whatever goes wrong."""
    try:
        return ready(name, task)()
    except Exception as e:
        raise RuntimeError(f"{type(e).__name__}: {e}".splitlines()[0]) from None


def caller(name: str, task: Task, stack: ExitStack | None) -> Callable[[], Sweep]:
    """What sweeps: in a process of its own, until the stack is closed, or (None) in this one."""
    if stack is None:
        return partial(run, name, task)
    pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
    return lambda: pool.submit(run, name, task).result()


def take_turns(
    task: Task, names: list[str], repeats: int, apart: bool
) -> tuple[dict[str, list[Sweep]], dict[str, str]]:
    """Timed sweeps by program, and why others failed; `apart`: each has a process of its own."""
    sweeps: dict[str, list[Sweep]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        calls = {name: caller(name, task, stack if apart else None) for name in names}
        for number in range(repeats + 1):  # in the first they get ready
            for name in [name for name in names if name not in failed]:
                start = time.perf_counter()
                try:
                    sweep = calls[name]()
                except RuntimeError as e:  # also BrokenProcessPool: a crash
                    failed[name] = str(e)
                    print(f"{name}: {e}", flush=True)
                    continue
                say = f"{1e3 * statistics.median(sweep.seconds):.1f} ms per step"
                print(f"{number} {name}: {say}, {time.perf_counter() - start:.0f} s", flush=True)
                if number:
                    sweeps[name].append(sweep)
    return {name: found for name, found in sweeps.items() if name not in failed}, failed


def summary(sweeps: list[Sweep], plain: list[Sweep]) -> dict:
    """Times of a step, tokens/s of all rows, and how the outputs compare with the plain ones."""
    speeds, others = ([speed(sweep) for sweep in both] for both in (sweeps, plain))
    rows = [*zip(sweeps[-1].outputs, plain[-1].outputs, strict=True)]
    return {
        "ms_per_step": 1e3 * statistics.median(s for sweep in sweeps for s in sweep.seconds),
        "ms_per_step_by_sweep": [1e3 * statistics.median(sweep.seconds) for sweep in sweeps],
        "steps": len(sweeps[-1].seconds),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_by_sweep": speeds,
        "speedup": statistics.median(a / b for a, b in zip(speeds, others, strict=True)),
        "identical": sum(theirs == ours for theirs, ours in rows),
        "rows": len(rows),
        "same_tokens": [[*map(int.__eq__, *row), False].index(False) for row in rows],
    }


def speed(sweep: Sweep) -> float:
    """Tokens per second of all rows; the first of each came from the prefill."""
    return sum(len(row) - 1 for row in sweep.outputs) / sum(sweep.seconds)


def markdown(results: dict[str, dict], failed: dict[str, str]) -> str:
    """A line per program."""
    head = ("program", "ms per step", "tokens/s", "of our plain", "identical rows")
    rows = [
        (name, f"{r['ms_per_step']:.1f}", f"{r['tokens_per_s']:.0f}", f"{r['speedup']:.2f}",
         f"{r['identical']}/{r['rows']}")
        for name, r in results.items()
    ]  # fmt: skip
    return table(head, rows + [(name, why, "", "", "") for name, why in failed.items()])


def make_task(rows: int, length: int, new_tokens: int, compiled: bool) -> Task:
    """Beginnings of standard modules. ValueError if they are shorter, or the demo's context is."""
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    prompts = [tuple(ids[:length]) for ids in demo_prompts(tokenizer, rows, 2 * length)]
    if {*map(len, prompts)} != {length}:
        raise ValueError(f"there are no {rows} prompts of {length} tokens")
    check_lengths(prompts, load_config(DEMO_CHECKPOINT).max_seq_len, new_tokens)
    return Task(tuple(prompts), new_tokens, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt_len", type=int, default=2000)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="programs whose names have this")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = (2, 130, 6) if args.smoke else (args.batch_size, args.prompt_len, args.max_new_tokens)
    repeats = 1 if args.smoke else args.repeats
    try:
        task = make_task(*sizes, compiled=not args.smoke)
    except ValueError as e:
        parser.error(str(e))
    names = [name for name in PROGRAMS if name == OURS or args.only in name]
    sweeps, failed = take_turns(task, names, repeats, apart=not args.smoke)
    if OURS in failed:
        sys.exit(1)
    results = {name: summary(found, sweeps[OURS]) for name, found in sweeps.items()}
    print(markdown(results, failed))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": machine(CPU) | {d.name: d.version for d in metadata.distributions()
                                       if d.name.replace("-", "_") in PACKAGES},
        "batch_size": sizes[0], "prompt_len": sizes[1], "new_tokens": sizes[2],
        "repeats": repeats, "programs": results, "failed": failed,
    }  # fmt: skip
    save(result, "peers_cpu", args.out, markdown(results, failed))


if __name__ == "__main__":
    main()
