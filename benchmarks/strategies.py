"""Every drafting strategy on the demo checkpoint: acceptance, step times, speedup.

    python benchmarks/strategies.py              # all parts, about 30 minutes on 2 cores
    python benchmarks/strategies.py --part grid  # or one of the others below
    python benchmarks/strategies.py --smoke      # tiny sizes, a minute: does it run?

grid      strategy x budget x gamma over three workloads that end just below the demo's 4,096 tokens
          of context: *continuation* of held-out modules; *recall*, a text that ends by starting to
          repeat a passage from thousands of tokens back, so that the right continuation lies far
          outside any window; *mixed*, half of the rows each.
defaults  the grid's workloads, every draft without a model of its own as `generate.py --draft NAME
          --gamma 5` has it: budget 128, selections as often as its policy says, draft weights auto.
mixed     the grid's workloads by `--draft mixed` and by its two parts alone, prompt lookup and
          snapkv, as `generate.py` has them: gamma is chosen on the way.
topics    snapkv at several `reselect_every` on a text whose topic changes: the prompt is made of
          excerpts of ten modules and ends by repeating the end of one, so that the continuation
          goes on into the next excerpt.
recall    the same on the grid's recall workload.
long      the same on 1,024 new tokens after held-out modules.
quarters  acceptance by quarter of 1,024 new tokens: does a draft model with 512 tokens of context
          hold out?

Acceptance is real: greedy decoding, every output compared with plain decoding's. A speedup is
tokens/s over the median of plain runs of the same prefill in the same process, taken in turn with
the speculative ones. Writes JSON, and a Markdown table beside it.
"""

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from auto import Auto, Candidate
from benchmarks.saving import save, table
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from device import timed
from drafters import with_weights
from kernels import compile_blocks
from measure import decode, environment, step_times, warm_up
from model import Transformer
from options import parse_args
from policies import POLICIES, Strategy
from prompts import DEMO_LONGEST, DEMO_MODULES, demo_prompts, module_source
from quantize import resolve
from roofline import GAMMAS
from sampling import Sampling
from spec_decode import Engine
from tokenizer import Tokenizer, load_tokenizer

PARTS = ("ngram", "snapkv", "mixed")  # values of --draft: two, and what has both
CUE = 32  # tokens of the repeated passage that are given


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    strategy: Strategy
    draft_model: Transformer | None


@dataclass(frozen=True, slots=True)
class Sizes:
    rows: int
    longest: int  # tokens of a prompt
    new_tokens: int
    long_prompt: int  # of the other parts
    long_new_tokens: int
    budgets: tuple[int, ...]
    gammas: tuple[int, ...]
    every: tuple[int, ...]  # reselect_every


FULL = Sizes(16, DEMO_LONGEST, 96, 3040, 1024, (64, 128, 256, 512), (2, 5),
             (0, 16, 8, 4))  # fmt: skip
SMOKE = Sizes(2, 130, 6, 130, 16, (64,), (2,), (0, 4))


def recall_prompts(tokenizer: Tokenizer, sizes: Sizes) -> list[list[int]]:
    """Held-out modules that end by repeating the first tokens of a passage from far back."""
    prompts = demo_prompts(tokenizer, sizes.rows, sizes.longest)
    rng = random.Random(0)
    starts = [rng.randrange(len(ids) // 8, len(ids) // 4) for ids in prompts]
    return [ids[:-CUE] + ids[s : s + CUE] for ids, s in zip(prompts, starts, strict=True)]


def topic_prompts(tokenizer: Tokenizer, sizes: Sizes) -> list[list[int]]:
    """Excerpts of ten held-out modules; the last tokens repeat the end of an early one."""
    n = (sizes.long_prompt - CUE) // 10
    prompts = []
    for row in range(sizes.rows // 2):
        names = random.Random(row).sample(DEMO_MODULES, 10)
        texts = [tokenizer.encode(module_source(name), bos=False) for name in names]
        ids = [tokenizer.bos_id] + [i for text in texts for i in text[1000 : 1000 + n]]
        end = 1 + n * (1 + row % 3) - CUE // 2  # the excerpt itself goes on for CUE / 2 tokens
        prompts.append(ids + ids[end - CUE : end])
    return prompts


def workloads(tokenizer: Tokenizer, sizes: Sizes) -> dict[str, list[list[int]]]:
    continuation = demo_prompts(tokenizer, sizes.rows, sizes.longest)
    recall = recall_prompts(tokenizer, sizes)
    mixed = [(continuation, recall)[row % 2][row] for row in range(sizes.rows)]
    return {"continuation": continuation, "recall": recall, "mixed": mixed}


def strategies(sizes: Sizes, draft: Transformer) -> list[Setting]:
    """Each once per gamma; with a budget, once per budget that fits."""
    settings = []
    for gamma in sizes.gammas:
        settings.append(Setting("ngram", Strategy("ngram", gamma), None))
        for budget in sizes.budgets:
            settings += [Setting(p, Strategy(p, gamma, budget), None) for p in POLICIES]
            if budget < draft.config.max_seq_len - gamma:
                strategy = Strategy("streaming", gamma, budget)
                settings.append(Setting("draft model, streaming", strategy, draft))
    return settings


def automatic_weights(model: Transformer) -> str:
    """The kind that a draft with the model's own weights has without being told."""
    weight = model.norm.weight
    return resolve("auto", model.config, weight.device, weight.dtype)


def defaults(model: Transformer) -> list[Setting]:
    """Every draft without a model of its own, at gamma 5 and with the flags' other defaults."""
    kind = automatic_weights(model)
    drafts = [Strategy("ngram", 5), *(Strategy(policy, 5, weights=kind) for policy in POLICIES)]
    return [Setting(d.policy, d, None) for d in drafts]


def prefilled(model: Transformer, prompts: list[list[int]], new_tokens: int) -> Engine:
    longest = max(map(len, prompts)) + new_tokens
    engine = Engine(model, len(prompts), longest, Strategy(), Sampling())
    engine.prefill(prompts, [new_tokens] * len(prompts))
    return engine


def decoded(
    engine: Engine, gamma: int, auto: Auto | None = None
) -> tuple[float, object, list[list[int]]]:
    """Tokens per second of one run from the prefill, its counts, its outputs."""
    engine.rewind()
    seconds, stats = timed(engine.device, lambda: decode(engine, gamma, auto))
    return stats.decoded_tokens / seconds, stats, engine.batch.outputs()


@dataclass(slots=True)
class Plain:
    """The baseline of a workload: repeated now and then, because shared machines drift."""

    speeds: list[float]  # tokens/s
    outputs: list[list[int]]

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


def compile_rounds(engine: Engine) -> None:
    """Two rounds of what will be timed; no row is finished after it."""
    engine.rewind()
    for _ in range(2):
        engine.round(engine.gamma)
    engine.rewind()


def measure(engine: Engine, setting: Setting, plain: Plain, repeats: int) -> dict:
    """One strategy on one prefilled workload."""
    engine.use(setting.strategy, setting.draft_model)
    gamma = engine.gamma
    compile_rounds(engine)
    ms = {name: statistics.median(t) for name, t in step_times(engine, repeats).items()}
    speed, stats, outputs = decoded(engine, gamma)
    select_s = 0.0
    if engine.drafter.select_every:
        engine.rewind()
        select_s, _ = timed(engine.device, engine.drafter.select)
    return {
        "strategy": setting.name,
        "budget": setting.strategy.budget,
        "gamma": gamma,
        "select_every": engine.drafter.select_every,
        "select_ms": 1e3 * select_s,
        **ms,
        "tokens_per_s": speed,
        "rounds": stats.rounds,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_rate_per_position": stats.acceptance_rate_per_position,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "identical": sum(a == b for a, b in zip(outputs, plain.outputs, strict=True)),
        "rows": len(outputs),
    }


def grid(
    model: Transformer, tokenizer: Tokenizer, sizes: Sizes, settings: list[Setting], repeats: int
) -> dict:
    """workload -> its plain speed and a list of results, one per strategy."""
    engines = {
        name: prefilled(model, prompts, sizes.new_tokens)
        for name, prompts in workloads(tokenizer, sizes).items()
    }
    plain = {name: Plain([], []) for name in engines}
    results = {name: [] for name in engines}
    for number, setting in enumerate(settings):
        torch._dynamo.reset()  # every geometry of a draft cache is compiled; few fit at a time
        for name, engine in engines.items():
            if number % 4 == 0:
                engine.rewind()
                engine.round(0)  # compiles
                speed, _, plain[name].outputs = decoded(engine, 0)
                plain[name].speeds.append(speed)
            r = measure(engine, setting, plain[name], repeats)
            results[name].append(r)
            say(name, r, plain[name].speed)
    for name, rs in results.items():
        for r in rs:
            r["speedup"] = r["tokens_per_s"] / plain[name].speed
    return {
        name: {"plain_tokens_per_s": plain[name].speeds, "results": results[name]}
        for name in engines
    }


def mixed(model: Transformer, tokenizer: Tokenizer, sizes: Sizes, repeats: int) -> dict:
    """workload -> tokens/s of plain decoding and of each of PARTS, repeated in turn."""
    kind = automatic_weights(model)
    found = {}
    for name, prompts in workloads(tokenizer, sizes).items():
        torch._dynamo.reset()
        longest = max(map(len, prompts)) + sizes.new_tokens
        engine = Engine(model, len(prompts), longest, Strategy(), Sampling())
        autos: dict[str, Auto | None] = {"plain": None}
        for draft in PARTS:
            allowed = parse_args(["--draft", draft]).strategies(max(GAMMAS))
            drafts = [Candidate(with_weights(d, kind, False)) for d in allowed]
            autos[draft] = Auto(engine, drafts, named=True)
            warm_up(engine, autos[draft])
        engine.prefill(prompts, [sizes.new_tokens] * len(prompts))
        speeds: dict[str, list[float]] = {draft: [] for draft in autos}
        expected, identical = None, 0
        for _ in range(repeats):
            for draft, auto in autos.items():
                speed, _, outputs = decoded(engine, 0, auto)
                speeds[draft].append(speed)
                expected = expected or outputs
                identical += sum(a == b for a, b in zip(outputs, expected, strict=True))
        mostly = {draft: str(auto.mostly) for draft, auto in autos.items() if auto}
        n_outputs = repeats * len(autos) * len(prompts)
        found[name] = {"tokens_per_s": speeds, "identical": identical, "outputs": n_outputs,
                       "mostly": mostly}  # fmt: skip
        print(name, {draft: statistics.median(s) for draft, s in speeds.items()}, flush=True)
    return found


def say(workload: str, r: dict, plain: float) -> None:
    print(
        f"{workload:12} {r['strategy']:22} budget {r['budget']:3} gamma {r['gamma']} "
        f"every {r['select_every']:2}: acceptance {r['draft_acceptance_rate']:.3f}, "
        f"T_D {r['draft_step_ms']:.1f}, T_V {r['verify_ms']:.1f}, "
        f"T_T {r['target_step_ms']:.1f} ms, "
        f"speedup {r['tokens_per_s'] / plain:.2f}, {r['identical']}/{r['rows']} identical",
        flush=True,
    )


def by_quarter(engine: Engine, setting: Setting, new_tokens: int) -> dict:
    """Tokens/s, and the draft acceptance rate in each quarter of the new tokens."""
    engine.use(setting.strategy, setting.draft_model)
    compile_rounds(engine)
    counts = [[0, 0] for _ in range(4)]  # accepted, drafted
    before = engine.batch.seq_len.clone()

    def count() -> None:
        gained = (engine.batch.seq_len - before).tolist()
        starts = (before - engine.batch.prompt_len).tolist()
        for start, n in zip(starts, gained, strict=True):
            if n:
                quarter = counts[min(4 * start // new_tokens, 3)]
                quarter[0] += n - 1
                quarter[1] += engine.gamma
        before.copy_(engine.batch.seq_len)

    seconds, stats = timed(engine.device, lambda: decode(engine, on_round=count))
    return {
        "strategy": setting.name,
        "budget": setting.strategy.budget,
        "gamma": engine.gamma,
        "select_every": engine.drafter.select_every,
        "tokens_per_s": stats.decoded_tokens / seconds,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_by_quarter": [a / max(d, 1) for a, d in counts],
    }


def long_runs(engine: Engine, runs: list[Setting], new_tokens: int) -> dict:
    """Each strategy over a long generation, with plain runs before and after."""
    decoded(engine, 0)  # compiles
    plain = [decoded(engine, 0)[0]]
    results = []
    for setting in runs:
        r = by_quarter(engine, setting, new_tokens)
        results.append(r)
        rates = " ".join(f"{rate:.3f}" for rate in r["acceptance_by_quarter"])
        print(
            f"{r['strategy']:22} budget {r['budget']} gamma {r['gamma']} every "
            f"{r['select_every']:2}: acceptance {r['draft_acceptance_rate']:.3f}, by quarter "
            f"{rates}, speedup {r['tokens_per_s'] / plain[0]:.2f}",
            flush=True,
        )
    plain.append(decoded(engine, 0)[0])
    for r in results:
        r["speedup"] = r["tokens_per_s"] / statistics.median(plain)
    return {"plain_tokens_per_s": plain, "results": results}


def reselect(model, prompts: list[list[int]], sizes: Sizes, new_tokens: int) -> dict:
    """What selecting again is worth, and what it costs; streaming beside it."""
    torch._dynamo.reset()
    budget = 256 if 256 in sizes.budgets else sizes.budgets[0]
    gamma = max(sizes.gammas)
    runs = [
        Setting("snapkv", Strategy("snapkv", gamma, budget, reselect_every=n), None)
        for n in sizes.every
    ]
    runs.append(Setting("streaming", Strategy("streaming", gamma, budget), None))
    return long_runs(prefilled(model, prompts, new_tokens), runs, new_tokens)


def quarters(model, draft, tokenizer, sizes: Sizes) -> dict:
    """Whether the short-context draft model keeps its acceptance over a long generation."""
    torch._dynamo.reset()
    gamma = sizes.gammas[len(sizes.gammas) // 2]
    runs = [
        Setting("draft model, streaming", Strategy("streaming", gamma, budget), draft)
        for budget in sizes.budgets
        if budget <= 256
    ]
    prompts = demo_prompts(tokenizer, sizes.rows // 2, sizes.long_prompt)
    return long_runs(prefilled(model, prompts, sizes.long_new_tokens), runs, sizes.long_new_tokens)


def markdown(grid_results: dict) -> str:
    """Per workload and strategy the row with the largest speedup."""
    head = ("workload", "strategy", "budget", "gamma", "acceptance", "T_D ms", "T_V / T_T",
            "speedup")  # fmt: skip
    rows = []
    for workload, entry in grid_results.items():
        best: dict[str, dict] = {}
        for r in sorted(entry["results"], key=lambda r: r["speedup"]):
            best[r["strategy"]] = r
        for name, r in sorted(best.items(), key=lambda item: -item[1]["speedup"]):
            budget = "" if name == "ngram" else r["budget"]
            ratio = r["verify_ms"] / r["target_step_ms"]
            rows.append((
                workload, name, budget, r["gamma"], f"{r['draft_acceptance_rate']:.2f}",
                f"{r['draft_step_ms']:.1f}", f"{ratio:.2f}", f"{r['speedup']:.2f}",
            ))  # fmt: skip
    return table(head, rows)


def mixed_markdown(found: dict) -> str:
    """Speedups over plain decoding, and what both parts together make of it."""
    rows = []
    for workload, entry in found.items():
        speed = {draft: statistics.median(s) for draft, s in entry["tokens_per_s"].items()}
        gains = [speed[draft] / speed["plain"] for draft in PARTS]
        rows.append((workload, *(f"{g:.2f}" for g in (*gains, gains[-1] / max(gains[:-1])))))
    return table(("workload", *(f"`--draft {d}`" for d in PARTS), "mixed over the better"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("defaults", "mixed", "topics", "recall", "long", "quarters", "grid")
    parser.add_argument("--part", choices=parts)
    parser.add_argument("--draft_checkpoint_path", type=Path,
                        default=DEMO_CHECKPOINT.with_name("demo-draft"))  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = SMOKE if args.smoke else FULL
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    model = load_model(DEMO_CHECKPOINT, device, dtype)
    draft = load_model(args.draft_checkpoint_path, device, dtype)
    for m in () if args.smoke else (model, draft):
        compile_blocks(m)
    repeats = 1 if args.smoke else args.repeats
    work = {
        "defaults": lambda: grid(model, tokenizer, sizes, defaults(model), repeats),
        "mixed": lambda: mixed(model, tokenizer, sizes, repeats),
        "topics": lambda: reselect(
            model, topic_prompts(tokenizer, sizes), sizes, sizes.long_new_tokens // 8
        ),
        "recall": lambda: reselect(
            model, recall_prompts(tokenizer, sizes), sizes, sizes.new_tokens
        ),
        "long": lambda: reselect(
            model,
            demo_prompts(tokenizer, sizes.rows // 2, sizes.long_prompt),
            sizes,
            sizes.long_new_tokens,
        ),
        "quarters": lambda: quarters(model, draft, tokenizer, sizes),
        "grid": lambda: grid(model, tokenizer, sizes, strategies(sizes, draft), repeats),
    }
    date = time.strftime("%Y-%m-%d")
    result = {"command": " ".join(["python", *sys.argv]), "date": date}
    with torch.inference_mode():
        result["environment"] = environment(Engine(model, 1, 1, Strategy(), Sampling()))
        for name in [args.part] if args.part else parts:
            result[name] = work[name]()
    part = f"_{args.part}" if args.part else ""
    tables = [markdown(result[name]) for name in ("defaults", "grid") if name in result]
    if args.part == "mixed":
        tables = [mixed_markdown(result["mixed"])]
    save(result, f"strategies{part}_{args.device}", args.out, "\n".join(tables) or None)


if __name__ == "__main__":
    main()
