"""Is bfloat16 speculation plain decoding, token by token? Without `--exact` and with it.

    python benchmarks/exact.py              # the demo, on 2 free cores some minutes
    python benchmarks/exact.py --smoke      # two short rows: does it run?

The demo's prompts, decoded plainly and by every strategy from one prefill, in one process: n of 16
outputs that are identical. A row that is not, is counted from where it parts: in tokens, and in the
logit margin there, of the two likeliest. Twice: as `generate.py --dtype bfloat16` does it, and with
`--exact`. Most tokens are decided clearly, so texts say little: counted are also the places, of the
first 16 plain rounds, whose logits have the very bits that a verification has there. And what
exactness costs: milliseconds of a plain step, and of a verification, in both. Those depend on the
machine, which should be idle; the counts do not. Writes JSON and a table.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from auto import Auto, Candidate
from benchmarks.saving import save
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from device import timed
from kernels import compile_blocks
from measure import Run, decode, differences, environment, step_times, warm_up
from options import AUTO_POLICIES
from policies import POLICIES, Strategy
from prompts import demo_prompts
from roofline import GAMMAS
from sampling import Sampling
from spec_decode import Engine
from tokenizer import load_tokenizer

GAMMA, ROUNDS = 5, 16


def one_run(engine: Engine, auto: Auto | None, gamma: int | None) -> Run:
    """Decode from the prefill."""
    engine.rewind()
    seconds, stats = timed(engine.device, lambda: decode(engine, gamma, auto))
    counts = stats.rounds, stats.row_rounds, stats.decoded_tokens, {}
    return Run(seconds, engine.batch.outputs(), *counts)


def logits_by_place(engine: Engine, gamma: int) -> list[dict[int, torch.Tensor]]:
    """What decided the next tokens, by row and place in the text, of ROUNDS tokens at least."""
    engine.rewind()
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(engine.batch.n_rows)]
    for _ in range(ROUNDS):
        lengths, draft = engine.batch.seq_len.tolist(), engine.draft(gamma)
        logits = engine.verify(draft)
        n_accepted, next_token = engine.accept(draft, logits)
        engine.around.commit(engine.batch, draft, n_accepted, next_token)
        for row, start, n, x in zip(found, lengths, n_accepted.tolist(), logits, strict=True):
            row |= {start + t: x[t].clone() for t in range(n + 1)}
    return found


def equal_places(engine: Engine) -> dict[str, int]:
    """Places decided by the same bits plainly and by verifications of streaming's drafts."""
    engine.use(Strategy("streaming", GAMMA))
    plain = logits_by_place(engine, 0)
    engine.rewind()
    engine.refresh()
    drafted = logits_by_place(engine, GAMMA)
    both = [(a[p], b[p]) for a, b in zip(plain, drafted, strict=True) for p in a.keys() & b.keys()]
    return {"places": len(both), "equal": sum(torch.equal(a, b) for a, b in both)}


def compare(model, prompts: list[list[int]], n_new: int, repeats: int) -> dict:
    """Plain decoding against every strategy, for a model that is exact or not."""
    gammas = tuple(g for g in GAMMAS if g <= GAMMA) if model.exact else GAMMAS
    engine = Engine(model, len(prompts), max(map(len, prompts)) + n_new, Strategy(), Sampling())
    candidates = [Candidate(Strategy(policy, max(gammas))) for policy in AUTO_POLICIES]
    auto = Auto(engine, candidates, gammas)
    warm_up(engine, auto)
    engine.prefill(prompts, [n_new] * len(prompts))
    plain, rows = one_run(engine, None, 0), []
    found = {"drafts": rows, "environment": environment(engine)}

    def add(name: str, run: Run) -> None:
        parted = differences(engine, prompts, run, plain) or []
        rows.append({"draft": name, "rounds": run.rounds, "rows": len(prompts),
                     "identical": len(prompts) - len(parted), "differences": parted})  # fmt: skip
        print(f"exact {model.exact}, {name}: {rows[-1]['identical']} of {len(prompts)}", flush=True)

    add("auto", one_run(engine, auto, None))
    for policy in (*POLICIES, "ngram"):
        engine.use(Strategy(policy, GAMMA))
        add(policy, one_run(engine, None, None))
    engine.rewind()
    times = step_times(engine, repeats)
    found["logits"] = equal_places(engine)
    print(f"exact {model.exact}, logits: {found['logits']}", flush=True)
    return found | {name: statistics.median(values) for name, values in times.items()}


def markdown(result: dict) -> str:
    """A line per strategy."""
    lines = ["| identical | without | with --exact |", "|---|---|---|"]
    sides = result["without"]["drafts"], result["exact"]["drafts"]
    for one, two in zip(*sides, strict=True):
        counts = (f"{r['identical']} of {r['rows']}" for r in (one, two))
        lines.append(f"| {one['draft']} | {' | '.join(counts)} |")
    places = (result[name]["logits"] for name in ("without", "exact"))
    counts = (f"{found['equal']} of {found['places']}" for found in places)
    lines.append(f"| logits of streaming, bit by bit | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--repeats", type=int, default=9, help="of the steps that are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer, n_rows, longest, n_new = load_tokenizer(DEMO_CHECKPOINT), 16, 3840, 256
    if args.smoke:
        n_rows, longest, n_new, args.repeats = 2, 120, 12, 1
    prompts = demo_prompts(tokenizer, n_rows, longest)
    model = load_model(DEMO_CHECKPOINT, torch.device("cpu"), DTYPES["bfloat16"])
    if not args.smoke:
        compile_blocks(model)
    result: dict = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    with torch.inference_mode():
        for name, exact in (("without", 0), ("exact", GAMMA)):
            model.exact = exact
            result[name] = compare(model, prompts, n_new, args.repeats)
    result["environment"] = result["without"]["environment"]
    table = markdown(result)
    print(table)
    save(result, "exact_cpu", args.out, table)


if __name__ == "__main__":
    main()
