"""How far a step is from the memory floor, and what speculation gains at 4k and 8k of context.

    python benchmarks/floor.py                # a minute or two; writes benchmarks/results/

The floor of a plain decode step is the time to read what it must read once, the K and V of all
valid tokens and the weights, at the read bandwidth of this machine measured in the same run, in
turn with the steps (shared machines drift) by summing the caches. The caches hold random numbers:
time does not depend on them. Acceptance is therefore synthetic too (`synthetic.py`): all draft and
verification work is done, only the accepted count is drawn. --acceptance is the probability that a
draft is accepted given that those before it were; 0.94 yields a mean acceptance length of 5.2.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from synthetic import SyntheticEngine, random_prompts

from benchmarks.saving import save
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from device import timed
from kernels import compile_blocks
from measure import decode, environment, step_bytes, step_times
from policies import Strategy
from prompts import demo_lengths
from sampling import Sampling
from spec_decode import Engine

NEW_TOKENS = 128


def read_caches(engine: Engine) -> None:
    """Read the whole full cache once, with all threads, doing the least that can be done."""
    for buffer in engine.full.k + engine.full.v:
        buffer.sum()


def measure(model, lengths: list[int], strategy: Strategy, rate: float, repeats: int) -> dict:
    """Step times and their floor at these lengths, and plain against speculative decoding."""
    B, max_len = len(lengths), max(lengths) + NEW_TOKENS
    engine = SyntheticEngine(model, B, max_len, strategy, Sampling(), rate=rate)
    gamma, n_bytes = strategy.gamma, step_bytes(engine, lengths)
    engine.prefill(random_prompts(lengths, model.config.vocab_size), [NEW_TOKENS] * B)
    device = engine.device
    cache_bytes = sum(buffer.nbytes for buffer in engine.full.k + engine.full.v)
    step_times(engine, repeats=2)  # compile
    times = step_times(engine, repeats, read=lambda: read_caches(engine))
    result = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = cache_bytes / (1e-3 * result.pop("read"))
    floor_ms = 1e3 * n_bytes / bandwidth
    result |= {
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "floor_bytes": n_bytes,
        "floor_ms": floor_ms,
        "target_step_over_floor": result["target_step_ms"] / floor_ms,
        "target_step_over_floor_by_repeat": [
            step / (n_bytes * read / cache_bytes)
            for step, read in zip(times["target_step_ms"], times["read"], strict=True)
        ],
    }
    speeds = {0: [], gamma: []}
    for _ in range(3):
        for g, measured in speeds.items():
            engine.rewind()
            seconds, stats = timed(device, lambda g=g: decode(engine, g))
            measured.append(stats.decoded_tokens / seconds)
    result |= {
        "plain_tokens_per_s": statistics.median(speeds[0]),
        "speculative_tokens_per_s": statistics.median(speeds[gamma]),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "speedup": statistics.median(
            ours / plain for ours, plain in zip(speeds[gamma], speeds[0], strict=True)
        ),
    }
    return {"environment": environment(engine), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--gamma", type=int, default=Strategy().gamma)
    parser.add_argument("--draft_budget", type=int, default=Strategy().budget)
    parser.add_argument("--acceptance", type=float, default=0.94)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    model = load_model(DEMO_CHECKPOINT, device, DTYPES[args.dtype])
    compile_blocks(model)
    strategy = Strategy("streaming", args.gamma, args.draft_budget)
    B = args.batch_size
    workloads = {"demo_lengths": demo_lengths(B), "8192": [8192] * B}
    result = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
              "gamma": args.gamma, "draft_budget": args.draft_budget, "batch_size": B,
              "synthetic_acceptance": args.acceptance}  # fmt: skip
    with torch.inference_mode():
        for name, lengths in workloads.items():
            r = result[name] = measure(model, lengths, strategy, args.acceptance, args.repeats)
            print(
                f"{name}: read {r['read_bandwidth_gb_per_s']:.1f} GB/s, "
                f"floor {r['floor_ms']:.1f} ms, T_T {r['target_step_ms']:.1f} ms "
                f"({r['target_step_over_floor']:.2f} x floor), "
                f"T_D {r['draft_step_ms']:.1f} ms, T_V({args.gamma}) {r['verify_ms']:.1f} ms, "
                f"speedup {r['speedup']:.2f} at synthetic acceptance {args.acceptance}",
                flush=True,
            )
    save(result, f"floor_{args.device}", args.out)


if __name__ == "__main__":
    main()
