"""One GPU, ten minutes at a time: is it right, how near to its memory floor, what is gained?

    python benchmarks/gpu.py --plan         # the parts, in order of worth, with what each may take
    python benchmarks/gpu.py                # as many of them as fit into --minutes
    python benchmarks/gpu.py                # again: goes on where the last one ended
    python benchmarks/gpu.py --only exact   # parts with this in their name, done or not
    python benchmarks/gpu.py --smoke        # all of it at toy sizes on the CPU

Nothing is downloaded: weights are random, of Llama-3.1-8B's geometry, made on the device, and so
are K and V; real acceptance comes from the demo checkpoint. The plan is printed first. A part
begins only if its estimate fits into what is left of --minutes, else a shorter one does. Estimates
are guesses until a part has run. A part that fails is recorded with its reason, and the others go
on; after every part the JSON is written, and a Markdown table beside it. A run that finds that JSON
does what is not in it. A part that failed is tried again last.

What is measured of one batch size and context: `gpu_point.py`. Points are made when a part asks for
one, and dropped for the next. The last lines are the cost model's constants, fitted to all plain
and verifying steps, and how far off its presets were.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from gpu_point import POLICY_GAMMA, Point, Settings, bandwidth

from checkpoint import DTYPES, KV_DTYPES, load_model, randomize
from config import MODELS, ModelConfig, open_json
from cost_model import Strategy as Planned
from cost_model import largest_batch
from files import write_json
from generate import main as generate_main
from kernels import compile_blocks
from measure import environment
from model import Transformer
from policies import Strategy
from roofline import HARDWARE, Timing, Workload, fit, forward_time
from sampling import Sampling
from spec_decode import Engine

TOY = ModelConfig(64, 1, 4, 2, 32, 96, 500, max_seq_len=2048)
LLAMA = MODELS["llama-3.1-8b"]
# One of eight GPUs that share Llama-3.1-8B, as in the paper's rows, but for the all-reduces.
RANK = replace(LLAMA, n_head=4, n_kv_head=1, ffn_dim=14336 // 8, vocab_size=128256 // 8)
FULL = Settings((256, 512, 1024, 2048), (1, 2, 3, 4, 5, 6, 7, 8, 12), (3, 5), 20)
SMOKE = Settings((16, 32), (1, 2), (2,), 2)
STREAMING, SNAPKV = (0.81, 0.9), (0.895, 0.95)  # arXiv 2408.11049 at 32k, and of easier text


@dataclass(frozen=True)
class Place:
    """A batch size and a context, of which model, with K and V of which type."""

    B: int
    S: int
    model: str = "llama"  # or rank
    kv_dtype: str | None = None

    def __str__(self) -> str:
        more = " of 8" * (self.model == "rank") + f" {self.kv_dtype}" * bool(self.kv_dtype)
        return f"({self.B}, {self.S}){more}"


@dataclass(frozen=True)
class Part:
    """Something to be measured."""

    name: str
    seconds: float  # that it may take on an H200: guessed, not measured
    work: Callable[["Bench", Point | None], dict]
    place: Place | None = None

    @property
    def key(self) -> str:
        return self.name + (f" at {self.place}" if self.place else "")


def tests(match: str) -> Callable[["Bench", Point | None], dict]:
    """The tests that need a GPU, those with these words in their names, in their own process."""
    return lambda bench, _: bench.tests(match)


def demo(*flags: str) -> Callable[["Bench", Point | None], dict]:
    return lambda bench, _: bench.demo([*flags])


def strategy(policy: str, budget: int, weights: str = "same") -> Strategy:
    return Strategy(policy, POLICY_GAMMA, budget, weights=weights)


def steps(bench: "Bench", point: Point) -> dict:
    """T_T and one T_V."""
    return point.plain() | point.verifications(bench.settings.round_gammas[:1])


def at_main(s: Settings, near: int, far: int, low: str) -> list[tuple[str, float, Callable]]:
    """What is measured where the goals are: name, seconds, work. The first run ends with them."""
    streaming, snapkv = strategy("streaming", near), strategy("snapkv", far)
    return [
        ("steps", 75, steps),
        ("drafts", 30, lambda b, p: p.drafts((near,))),
        ("rounds streaming", 40, lambda b, p: p.rounds(streaming, STREAMING)),
        ("rounds snapkv", 45, lambda b, p: p.rounds(snapkv, SNAPKV)),
        ("exact", 40, lambda b, p: p.exact(s.round_gammas[-1])),
        ("baselines", 60, lambda b, p: p.baselines()),
        ("drafts " + low, 30, lambda b, p: p.drafts((near,), low)),
        ("rounds streaming " + low, 40,
         lambda b, p: p.rounds(replace(streaming, weights=low), STREAMING)),
        ("rounds snapkv " + low, 45, lambda b, p: p.rounds(replace(snapkv, weights=low), SNAPKV)),
    ]  # fmt: skip


def deeper(s: Settings, far: int) -> list[tuple[str, float, Callable]]:
    """And there, by gamma, budget and settings of the kernel."""
    gamma = s.round_gammas[0]
    programs, other = (1, 2, 3, 4), [{"num_warps": 4}, {"num_warps": 8}, {"num_stages": 2}]
    other += [{"BLOCK_N": 128}, {"BLOCK_N": 128, "num_warps": 4}]
    return [
        ("selection", 40, lambda b, p: p.selection(strategy("snapkv", far))),
        ("programs of plain steps", 40, lambda b, p: p.split_sweep(0, programs)),
        ("programs of verifications", 40, lambda b, p: p.split_sweep(gamma, programs)),
        ("kernel of plain steps", 60, lambda b, p: p.sweep(0, other)),
        ("kernel of verifications", 60, lambda b, p: p.sweep(gamma, other)),
        ("all verifications", 120, lambda b, p: p.verifications(s.gammas)),
        ("all drafts", 50, lambda b, p: p.drafts(s.budgets)),
    ]


def elsewhere(s: Settings, places: dict[str, Place], low: str) -> list[Part]:
    """Fewer rows, longer texts, float8 K and V, one rank of eight."""
    few, long, rank = places["few"], places["long"], places["rank"]
    near, *_ = s.budgets[1:]
    found = [
        ("exact", 60, lambda b, p: p.exact(s.round_gammas[-1]), few),
        ("steps", 30, steps, few),
        ("prefill", 40, lambda b, p: p.prefill((1024, 2048, 4096, 8192)), few),
        ("steps", 60, steps, places["float8"]),
        ("steps", 60, steps, long),
        ("drafts " + low, 30, lambda b, p: p.drafts((near,), low), long),
        ("prefill", 60, lambda b, p: p.prefill((2048, 8192)), long),
        ("steps", 45, steps, rank),
        ("drafts", 30, lambda b, p: p.drafts((near,)), rank),
    ]
    return [Part(name, seconds, work, place) for name, seconds, work, place in found]


def parts(smoke: bool) -> list[Part]:
    """Everything, in order of worth."""
    s, main, other = FULL, Place(24, 32768), Place(16, 32768)
    places = {
        "few": Place(8, 32600),  # 256 blocks, which pieces divide
        "float8": replace(main, kv_dtype="float8"),
        "long": Place(long_rows(), 100_000, kv_dtype="float8"),
        "rank": Place(128, 32768, "rank"),
    }
    more, near, far, low = [(1, 32768), (32, 16384), (64, 8192), (128, 4096)], 512, 2048, "fp8"
    if smoke:
        s, main, other, more, near, far, low = (
            SMOKE,
            Place(2, 300),
            Place(1, 200),
            [],
            16,
            32,
            "int8",
        )
        places = {"few": Place(1, 100), "float8": Place(2, 200), "long": Place(1, 400),
                  "rank": Place(2, 100, "rank")}  # fmt: skip

    def there(found: list[tuple[str, float, Callable]]) -> list[Part]:
        return [Part(*part, main) for part in found]

    return [
        Part("bandwidth", 15, lambda bench, _: bench.bandwidth()),
        Part("tests of texts", 100, tests("greedy_output or exact or split_kv")),
        *there(at_main(s, near, far, low)),
        Part("steps", 45, steps, other),
        Part("demo float32", 40, demo("--dtype", "float32")),
        Part("demo exact", 40, demo("--dtype", "bfloat16", "--exact")),
        *there(deeper(s, far)),
        *elsewhere(s, places, low),
        *([] if smoke else [Part("tests", 240, tests(""))]),
        *(Part("steps", 45, steps, Place(B, S)) for B, S in more),
    ]


def long_rows() -> int:
    """Most rows of 100k tokens with float8 K and V that leave room to draft, less one."""
    w, drafting = Workload(1, 100_000, kv_itemsize=1), Planned("streaming", 5, 512, weights="fp8")
    return max(largest_batch(LLAMA, HARDWARE["h200"], w, drafting) - 1, 1)


class Bench:
    """What parts share: the device, models and the newest point, which are made when asked for."""

    def __init__(self, smoke: bool, out: Path) -> None:
        self.smoke, self.out = smoke, out
        self.device = torch.device("cpu" if smoke else "cuda")
        self.settings = SMOKE if smoke else FULL
        self.per_second = 1e9  # bytes, until they are measured
        self.place: Place | None = None
        self.point: Point | None = None
        self.model: tuple[str, Transformer] | None = None

    def bandwidth(self) -> dict:
        """Of a copy and of a sum, bytes/s."""
        return bandwidth(self.device, 2**24 if self.smoke else 2**33)

    def load(self, name: str) -> Transformer:
        """Random weights of the geometry; one model at a time."""
        if self.model is None or self.model[0] != name:
            self.drop(model=True)
            if name == "llama" and not self.smoke:
                model = load_model(Path("random:llama-3.1-8b"), self.device, DTYPES["bfloat16"])
            else:
                dtype = torch.float32 if self.smoke else torch.bfloat16
                config = TOY if self.smoke else RANK
                with torch.device(self.device):
                    model = Transformer(config).eval().requires_grad_(False)
                frequencies = model.rope_freq  # stay float32
                model = model.to(dtype)
                model.rope_freq = frequencies
                randomize(model)
            if not self.smoke:
                compile_blocks(model)
            self.model = name, model
        return self.model[1]

    def at(self, place: Place) -> Point:
        """The point, made anew if the last one was another."""
        if self.place != place or self.point is None:
            self.drop()
            torch._dynamo.reset()  # shapes of the point before
            model = self.load(place.model)
            model.kv_dtype = KV_DTYPES[place.kv_dtype] if place.kv_dtype else None
            self.point = Point(model, place.B, place.S, self.per_second, self.settings)
            self.place = place
        return self.point

    def drop(self, model: bool = False) -> None:
        """Give memory back."""
        self.point = self.place = None
        if model:
            self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tests(self, match: str) -> dict:
        """They need the memory too."""
        self.drop(model=True)
        log = self.out.with_suffix(f".tests{'_all' * (not match)}.txt")
        command = [sys.executable, "-m", "pytest", "-v", "tests/test_cuda.py", "-k", match]
        status = run_logged(command, log, 300)
        output = log.read_text()
        last = "" if status is None else output.strip().split("\n")[-1]
        last = last or f"not done in 300 s, see {log}"
        print(f"    {last}", flush=True)
        return {"command": " ".join(command[1:]), "status": status, "last_line": last,
                "output": output[-4000:] if status != 0 else ""}  # fmt: skip

    def demo(self, more: list[str]) -> dict:
        """The demo's own run: real acceptance. What --json writes, without its texts."""
        self.drop(model=True)
        file = self.out.with_suffix(".demo.json")
        flags = ["--device", self.device.type, *more, "--json", str(file), "--check_lossless"]
        if self.smoke:
            flags += ["--batch_size", "2", "--max_new_tokens", "8", "--max_context", "300"]
            flags += ["--no-compile"]
        status = generate_main([*flags, "--draft", "streaming", "--speculate_k", "5"])
        result = {"flags": flags, "status": status}
        if file.exists():
            run = open_json(file).of(dict)
            result |= {k: v for k, v in run.items() if k not in ("outputs", "model")}
            file.unlink()
        return result


def run_logged(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command, None if it was ended for taking longer; its output is in `log`."""
    with log.open("w") as file:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds,
                check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return None


def waiting(every: list[Part], done: dict) -> list[Part]:
    """Those not done; at the end those that failed, to be tried again."""
    left = [part for part in every if "result" not in done.get(part.key, {})]
    return sorted(left, key=lambda part: part.key in done)


def show_plan(left: list[Part], minutes: float) -> None:
    """The parts with their estimates, and where the time will probably end."""
    total = 0.0
    for part in left:
        total += part.seconds
        fits = "" if total <= 60 * minutes else "  (a later run)"
        print(f"{part.seconds:5.0f} s {total:6.0f} s  {part.key}{fits}")
    print(flush=True)


def perform(bench: Bench, left: list[Part], result: dict, end: float) -> None:
    """Do the parts that fit, one after the other; save after each."""
    done = result["parts"]
    for part in left:
        if time.monotonic() + part.seconds > end:
            print(f"no time for {part.key}", flush=True)
            continue
        began, entry = time.monotonic(), {}
        print(f"{part.key} ...", flush=True)
        try:
            with torch.inference_mode():
                entry["result"] = part.work(bench, bench.at(part.place) if part.place else None)
        except Exception as e:
            if bench.smoke:
                raise
            entry["failed"] = f"{type(e).__name__}: {e}"[:2000]
            print(f"    failed: {entry['failed']}", flush=True)
            bench.drop()  # a point that failed is not used again
        entry["seconds"] = time.monotonic() - began
        entry["estimate"] = part.seconds
        if part.place:
            entry["place"] = asdict(part.place)
        done[part.key] = entry
        if part.name == "bandwidth" and "result" in entry:
            bench.per_second = entry["result"]["bytes_per_s"]
        print(f"    {entry['seconds']:.0f} s", flush=True)
        write_json(result, bench.out)
        bench.out.with_suffix(".md").write_text(markdown(result))


def steps_of(result: dict) -> Iterator[tuple[str, dict, dict]]:
    """Place, its settings and figures of plain steps, of parts that were done."""
    for key, entry in result["parts"].items():
        if key.startswith("steps at ") and "result" in entry:
            yield key.removeprefix("steps at "), entry["place"], entry["result"]


def cost_model_fit(result: dict, smoke: bool) -> dict:
    """The cost model's constants from all plain and verifying steps, and how well they explain."""
    config, kind = (TOY, "cpu") if smoke else (LLAMA, "h200")
    timings = []
    for _, place, figures in steps_of(result):
        if place["model"] != "llama":
            continue
        size = 4 if smoke else 2
        kv = 1 if place["kv_dtype"] == "float8" else None
        w = Workload(place["B"], place["S"], itemsize=size, kv_itemsize=kv)
        key = f"all verifications at {Place(**place)}"
        figures = figures | result["parts"].get(key, {}).get("result", {})
        for name, step in figures.items():
            if name == "T_T" or name.startswith("T_V"):
                T = 1 if name == "T_T" else int(name[4:-1]) + 1
                timings.append(Timing(w, T, w.prefix_len, 1e-3 * step["ms"]))
    hw, error = fit(config, HARDWARE[kind], timings)
    before = [abs(forward_time(config, HARDWARE[kind], t.workload, t.T).total / t.seconds - 1)
              for t in timings]  # fmt: skip
    return {"hardware": asdict(hw), "median_error": error,
            "median_error_of_the_preset": statistics.median(before)}  # fmt: skip


def markdown(result: dict) -> str:
    """A line per point: steps against their floors, and the best rounds."""
    head = ("point", "T_T ms", "x floor", "T_V / T_T", "T_D x floor", "best rounds", "SDPA",
            "gpt-fast style")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    done = {key: entry["result"] for key, entry in result["parts"].items() if "result" in entry}
    for place, _, s in steps_of(result):
        t = s["T_T"]["ms"]
        verify = [f"{v['ms'] / t:.2f} ({name})" for name, v in s.items() if name.startswith("T_V")]
        drafts = [
            f"{v['over_floor']:.2f} ({name[2:]}{key[6:].split(' at ')[0]})"
            for key, r in done.items() if key.startswith("drafts") and key.endswith(f" at {place}")
            for name, v in r.items()
        ]  # fmt: skip
        runs = [run for key, r in done.items() if key.startswith("rounds ") and key.endswith(place)
                for run in r["runs"]]  # fmt: skip
        best = {}
        for run in sorted(runs, key=lambda run: run["speedup"]):
            best[run["policy"], run["weights"], run["synthetic_acceptance"]] = run
        words = [f"{policy} {weights} at {rate}: {run['speedup']:.2f}"
                 for (policy, weights, rate), run in best.items()]  # fmt: skip
        base = done.get(f"baselines at {place}", {})
        others = (f"{base[k] / t:.2f} T_T" if k in base else ""
                  for k in ("sdpa_ms", "gpt_fast_style_ms"))  # fmt: skip
        cells = (place, f"{t:.2f}", f"{s['T_T']['over_floor']:.2f}", ", ".join(verify),
                 ", ".join(drafts), "; ".join(words), *others)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing beyond them")
    parser.add_argument("--only", default="", help="parts with this in their name, done or not")
    parser.add_argument("--plan", action="store_true", help="print the plan, do nothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    start, args = time.monotonic(), parse_args()
    if not (args.smoke or args.plan) and not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no GPU here; --smoke runs everything at toy sizes on the CPU")
    out = args.out or ROOT / "benchmarks" / "results" / (
        "gpu_smoke.json" if args.smoke else "gpu.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    result = open_json(out).of(dict) if out.exists() else {"parts": {}, "runs": []}
    every = [part for part in parts(args.smoke) if args.only in part.key]
    left = every if args.only else waiting(every, result["parts"])
    show_plan(left, args.minutes)
    if args.plan:
        return
    bench = Bench(args.smoke, out)
    known = result["parts"].get("bandwidth", {}).get("result")
    bench.per_second = known["bytes_per_s"] if known else bench.per_second
    tiny = Transformer(TOY).to(bench.device, torch.float32 if args.smoke else torch.bfloat16)
    result["environment"] = environment(Engine(tiny, 1, 1, Strategy(), Sampling()))
    run = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d %H:%M")}
    result["runs"].append(run)
    perform(bench, left, result, start + 60 * args.minutes)
    if any(True for _ in steps_of(result)):
        result["cost_model"] = cost_model_fit(result, args.smoke)
        print(f"cost model fitted: median error {result['cost_model']['median_error']:.1%}, of the "
              f"preset {result['cost_model']['median_error_of_the_preset']:.1%}")  # fmt: skip
    run["seconds"] = time.monotonic() - start
    write_json(result, out)
    out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result) + f"wrote {out}; {len(waiting(every, result['parts']))} parts are left")


if __name__ == "__main__":
    main()
