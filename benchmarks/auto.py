"""Does `--draft auto` decide well, and does the calibrated cost model predict the steps?

    python benchmarks/auto.py              # 10 to 20 minutes on 2 cores
    python benchmarks/auto.py --cell 16 256 --cell 1 1024    # these cells alone
    python benchmarks/auto.py --smoke      # two tiny cells: does it run?

Over a grid of batch size B and context S, the same --texts held-out prompts, B at a time: how well
one text is foreseen is luck. From each prefill run in turn, --repeats times: plain decoding, every
fixed choice (policy x gamma), and auto. A way's tokens/s are all tokens over all seconds, the
median ones of each batch. A fixed choice that is far behind the best one (FAR) in a batch's first
turn has no other there. Auto's probing is inside its time, as it is for a user. Beside it, T_T, T_V
and T_D as the cost model predicts them after its calibration (at other lengths of the same batch),
against the steps as they are timed after the last prefill. Writes JSON, and a Markdown table.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from auto import Auto, Candidate
from benchmarks.saving import save, table
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from cost_model import Strategy as Planned
from device import timed
from kernels import compile_blocks
from measure import decode, environment, step_times, warm_up
from options import AUTO_POLICIES
from policies import Strategy
from prompts import demo_prompts
from roofline import GAMMAS, forward_time
from sampling import Sampling
from spec_decode import Engine
from tokenizer import load_tokenizer

FAR = 0.7  # of the best fixed choice's tokens/s


def predicted_against_timed(engine: Engine, auto: Auto, repeats: int) -> list[dict]:
    """T_T, T_V and T_D by the calibrated model and by the clock, after the prefill."""
    S = int(engine.batch.prompt_len.float().mean())
    w = auto.workload(S)
    config, hw, found = engine.model.config, auto.hardware, []
    for gamma in GAMMAS:
        engine.use(Strategy("streaming", gamma))
        engine.rewind()
        step_times(engine, 1)
        ms = {k: statistics.median(v) for k, v in step_times(engine, repeats).items()}
        strategy = engine.drafter.strategy
        streaming = Planned("streaming", gamma, strategy.budget)
        verify = auto.verify_seconds(S)
        found += [
            {"what": "T_T", "predicted_ms": 1e3 * verify[0], "ms": ms["target_step_ms"],
             "formula_ms": 1e3 * forward_time(config, hw, w).total},
            {"what": f"T_V({gamma})", "predicted_ms": 1e3 * verify[gamma], "ms": ms["verify_ms"],
             "formula_ms": 1e3 * forward_time(config, hw, w, gamma + 1).total},
            {"what": "T_D", "predicted_ms": 1e3 * streaming.draft_seconds(config, hw, w),
             "ms": ms["draft_step_ms"]},
        ]  # fmt: skip
    return found


def cell(model, tokenizer, B: int, S: int, args: argparse.Namespace) -> dict:
    """One batch size and context: all texts, batch by batch, in all ways."""
    torch._dynamo.reset()
    new_tokens, n_texts = args.new_tokens, max(args.texts, B)
    prompts = [ids[:S] for ids in demo_prompts(tokenizer, n_texts, 2 * S)]
    engine = Engine(model, B, S + new_tokens, Strategy(), Sampling())
    auto = Auto(engine, [Candidate(Strategy(p, max(GAMMAS))) for p in AUTO_POLICIES])
    device = engine.device
    compile_s, _ = timed(device, lambda: warm_up(engine, auto))
    fixed = {policy: engine.add(Strategy(policy, max(GAMMAS))) for policy in AUTO_POLICIES}
    speeds: dict[str, list[list[float]]] = {}  # by batch, tokens/s
    first: Counter[str] = Counter()  # what auto chose, and how often,
    mostly: Counter[str] = Counter()  # what most tokens came from

    def run(name: str, work) -> list[list[int]]:
        engine.rewind()
        seconds, stats = timed(device, work)
        speeds[name][-1].append(stats.decoded_tokens / seconds)
        return engine.batch.outputs()

    for i in range(0, len(prompts), B):
        engine.prefill(prompts[i : i + B], [new_tokens] * B)
        decode(engine, 0)
        expected = engine.batch.outputs()
        choices = {f"{policy} {g}": (policy, g) for policy, g in product(fixed, GAMMAS)}
        for name in ("plain", *choices, "auto"):
            speeds.setdefault(name, []).append([])
        for _ in range(args.repeats):
            outputs = {"plain": run("plain", lambda: decode(engine, 0))}
            for name, (policy, gamma) in choices.items():
                engine.switch(fixed[policy])
                engine.verify(engine.draft(gamma))  # compile
                outputs[name] = run(name, lambda g=gamma: decode(engine, g))
            outputs["auto"] = run("auto", lambda: decode(engine, auto=auto))
            first[str(auto.first)] += 1
            mostly[str(auto.mostly)] += 1
            for name, output in outputs.items():
                if output != expected:
                    raise RuntimeError(f"{name} at B = {B}, S = {S} changed the output")
            best = max(speeds[name][-1][0] for name in choices)
            choices = {n: how for n, how in choices.items() if speeds[n][-1][0] >= FAR * best}
    mean = {  # every batch has as many tokens
        name: statistics.harmonic_mean(map(statistics.median, batches))
        for name, batches in speeds.items()
    }
    plain, ours = mean.pop("plain"), mean.pop("auto")
    best = max(mean, key=mean.get)
    best_speed = max(mean[best], plain)
    return {
        "batch_size": B,
        "prefix_len": S,
        "prepare_seconds": compile_s,
        "tokens_per_s": speeds,
        "auto_chose": dict(first.most_common()),
        "auto_used_mostly": dict(mostly.most_common()),
        "auto_over_plain": ours / plain,
        "best_fixed": best if mean[best] > plain else "none",
        "best_fixed_over_plain": best_speed / plain,
        "auto_over_best_fixed": ours / best_speed,
        "fit_error": auto.fit_error,
        "steps": predicted_against_timed(engine, auto, repeats=5),
    }


def markdown(cells: list[dict]) -> str:
    """A line per cell of the grid."""
    head = ("B", "S", "auto used mostly", "auto / plain", "best fixed", "best fixed / plain",
            "auto / best fixed")  # fmt: skip
    rows = [
        (c["batch_size"], c["prefix_len"], next(iter(c["auto_used_mostly"])),
         f"{c['auto_over_plain']:.2f}", c["best_fixed"], f"{c['best_fixed_over_plain']:.2f}",
         f"{c['auto_over_best_fixed']:.2f}")
        for c in cells
    ]  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--texts", type=int, default=4, help="of a cell, or as many as B if more")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cell", type=int, nargs=2, action="append", metavar=("B", "S"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    model = load_model(DEMO_CHECKPOINT, torch.device(args.device), DTYPES[args.dtype])
    grid = [(B, S) for B in (1, 4, 16) for S in (256, 1024, model.config.max_seq_len)]
    grid = args.cell or grid
    if args.smoke:
        grid, args.new_tokens, args.texts, args.repeats = [(1, 64), (2, 300)], 8, 2, 1
    else:
        compile_blocks(model)
    cells = []
    with torch.inference_mode():
        where = environment(Engine(model, 1, 1, Strategy(), Sampling()))
        for B, S in grid:
            S = min(S, model.config.max_seq_len - args.new_tokens)
            c = cell(model, tokenizer, B, S, args)
            cells.append(c)
            off = [abs(s["predicted_ms"] / s["ms"] - 1) for s in c["steps"]]
            print(
                f"B {B:2} S {S:4}: auto {c['auto_over_plain']:.2f} of plain, mostly "
                f"{next(iter(c['auto_used_mostly']))}; best fixed {c['best_fixed']} "
                f"{c['best_fixed_over_plain']:.2f}; steps predicted within "
                f"{statistics.median(off):.0%} (median), {max(off):.0%}",
                flush=True,
            )
    date = time.strftime("%Y-%m-%d")
    result = {"command": " ".join(["python", *sys.argv]), "date": date, "environment": where,
              "new_tokens": args.new_tokens, "texts": args.texts, "cells": cells}  # fmt: skip
    save(result, f"auto_{args.device}", args.out, markdown(cells))


if __name__ == "__main__":
    main()
