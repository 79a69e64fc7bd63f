"""What the documents say of raw files: a function for every block of `figures.py`.

Each is handed the contents of its raw files and returns Markdown. A table that a benchmark writes
by itself is that benchmark's `markdown`. The numbers of a sentence come from the files, its words
from here: who measures again reads them again.
"""

import io
import statistics
import sys
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cost_model as cost
from benchmarks import paper
from benchmarks.auto import markdown as auto_table
from benchmarks.offline import markdown as offline_table
from benchmarks.offline import predicted
from benchmarks.offline import summary as offline_summary
from benchmarks.peers import markdown as peers_table
from benchmarks.saving import table
from benchmarks.strategies import markdown as strategies_table
from benchmarks.strategies import mixed_markdown
from checkpoint import DEMO_CHECKPOINT
from config import MODELS, kv_bytes_per_token, layer_params, total_params
from families import load_config
from policies import POLICIES, Strategy
from prompts import DEMO_ROWS, demo_lengths
from roofline import HARDWARE, Workload, forward_time

COMMAND = "python cost_model.py --num_gpus 8 --batch_size 32 128 --prefix_len 8192 32768"
LENGTHS, BATCHES = (8192, 32768), (32, 128)  # of COMMAND
RUN_LINES, RUN_TOKENS = 4, 64  # equal ones that end a text which repeats itself


def sentences(text: str) -> str:
    """A paragraph in lines of at most 100 characters; what is in backticks may be broken."""
    return fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False) + "\n"


def span(values: list[float], form: str = ".2f") -> str:
    """The smallest to the largest."""
    return f"{min(values):{form}} to {max(values):{form}}"


def fenced(text: str, language: str = "text") -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```\n"


# The demo


def ways(raw: dict) -> list[dict]:
    """A dictionary for every decoding of `generate.py --json`, plain decoding first.

    That of one draft beside plain decoding is made into the form that several have.
    """
    if "runs" in raw:
        return raw["runs"]  # the demo's table, of which each line has a temperature
    run, plan = raw["speculative"], raw["plan"]
    rows = len(raw["outputs"])
    drafted = run | {
        "name": f"auto ({plan['strategy']})" if "candidates" in plan else plan["strategy"],
        "gamma": plan["gamma"],
        "speedup": raw["speedup"],
        "row_speedup": raw["row_speedup"],
        "identical_rows": rows - len(raw.get("differences", ())),
        "formula": predicted(run, plan["gamma"], run["mean_acceptance_length"]),
    }
    return [raw["baseline"] | {"name": "plain"}, drafted]


def demo(raw: dict) -> str:
    """What the demo prints: a line for each way to draft, the formula beside the measurement."""
    head = ("way to draft", "tokens/s", "acceptance rate", "tokens per round", "T_D, ms",
            "T_V, ms", "formula", "speedup of a row", "of the batch",
            "same text")  # fmt: skip
    rows = []
    for way in ways(raw):
        sampled = f", temperature {way['temperature']}" if way.get("temperature") else ""
        if "draft_step_ms" not in way:
            rows.append((way["name"] + sampled, f"{way['decode_tokens_per_second']:.0f}", "", "1",
                         "", f"{way['target_step_ms']:.1f}", "", "", "", ""))  # fmt: skip
            continue
        rows.append((
            way["name"] + sampled, f"{way['decode_tokens_per_second']:.0f}",
            f"{way['draft_acceptance_rate']:.2f}", f"{way['mean_acceptance_length']:.2f}",
            f"{way['draft_step_ms']:.1f}", f"{way['verify_ms']:.1f}",
            f"{way['formula']:.2f}", f"{way['row_speedup']:.2f}",
            f"**{way['speedup']:.2f}**", f"{way['identical_rows']} of {len(raw['outputs'])}",
        ))  # fmt: skip
    return table(head, rows)


def step_bytes() -> str:
    """What a step of the demo reads: arithmetic."""
    model, budget = load_config(DEMO_CHECKPOINT), Strategy().budget
    lengths, per_token = demo_lengths(DEMO_ROWS), kv_bytes_per_token(model, 4)
    layers = model.n_layer * layer_params(model)
    full = sum(lengths) * per_token
    draft = DEMO_ROWS * budget * kv_bytes_per_token(model, 2)  # bfloat16, as its weights
    weights = 4 * total_params(model)
    lower = weights - 2 * layers  # in the layers bfloat16 instead of float32
    rows = [
        (f"plain, {DEMO_ROWS} rows of {min(lengths):,} to {max(lengths):,} tokens", full, weights),
        (f"draft, {budget} tokens of a row", draft, lower),
    ]
    cells = [(name, *(f"{n / 1e6:,.0f} MB" for n in (a, b, a + b))) for name, a, b in rows]
    return table(("step", "K and V", "weights", "together"), cells)


def shown(pieces: list[str]) -> str:
    """Tokens with a blank between them; line ends and indentation can be seen."""
    marks = {"\n": "⏎"}
    return " ".join(marks.get(piece, piece.strip() or "·") for piece in pieces)


def one_round(raw: dict) -> str:
    """A round of three rows, and in words the first one of each kind."""
    line = "{:>3}{:>9}  {:30}{:30}{:>4}{:>5}".format
    lines = [line("row", "decided", "the draft guesses", "the model says", "kept", "new")]
    told: dict[bool, str] = {}
    for r in raw["rows"]:
        said, gamma, row, kept = r["model_says"], len(r["drafted"]), r["row"], r["kept"]
        everything = kept == gamma
        says = f"the same, then {shown(said[-1:])}" if everything else shown(said)
        lines.append(line(row, f"{r['decided']:,}", shown(r["drafted"]), says, kept, r["new"]))
        told.setdefault(everything, f"Row {row}: " + (
            f"all {gamma} guesses stay, and the model adds a token." if everything else
            f"{kept} of {gamma} guesses stay, the model's own token follows, the rest is dropped."
        ))  # fmt: skip
    return fenced("\n".join(lines)) + "\n" + sentences(" ".join(told.values()))


def formula(demo_raw: dict, offline_raw: dict) -> str:
    """The formula and two measurements: of a static batch, and of rows that are refilled.

    The batch is the one drafted by a window, or else the last of the demo.
    """
    plain, *drafted = ways(demo_raw)
    way = next((w for w in drafted if w["name"].startswith("streaming")), drafted[-1])
    refilled = offline_raw["drafted_over_plain"]["decoding"]
    return sentences(
        f"For {way['name']} in the demo's table it says {way['mean_acceptance_length']:.2f} * "
        f"{plain['target_step_ms']:.1f} / ({way['gamma']} * {way['draft_step_ms']:.1f} + "
        f"{way['verify_ms']:.1f}) = {way['formula']:.2f}. A row gained "
        f"{way['row_speedup']:.2f}, the batch {way['speedup']:.2f}. For a file of "
        f"{offline_raw['sizes']['prompts']} prompts with {offline_raw['plan']['strategy']} it says "
        f"{offline_raw['predicted_speedup']:.2f}, and the file gained {refilled:.2f}."
    )  # fmt: skip


# Measurements of benchmarks/README.md


def floor(raw: dict) -> str:
    """Steps beside the time to read what they read."""
    gamma, rows = raw["gamma"], []
    for name in ("demo_lengths", "8192"):
        r = raw[name]
        rows.append((
            name.replace("demo_lengths", "3,000 to 3,840").replace("8192", "8,192"),
            f"{r['read_bandwidth_gb_per_s']:.0f} GB/s", f"{r['floor_ms']:.1f} ms",
            f"{r['target_step_ms']:.1f} ms", f"{r['target_step_over_floor']:.2f}",
            f"{r['draft_step_ms']:.1f} ms", f"{r['verify_ms']:.1f} ms", f"{r['speedup']:.2f}",
        ))  # fmt: skip
    head = ("context", "read", "floor", "T_T", "T_T / floor", "T_D", f"T_V({gamma})", "speedup")
    return table(head, rows) + "\n" + sentences(
        f"Acceptance is synthetic here: {raw['synthetic_acceptance']} for each draft, which yields "
        f"{raw['8192']['mean_acceptance_length']:.2f} tokens per round."
    )  # fmt: skip


def peers(raw: dict) -> str:
    """Plain steps of several programs."""
    return peers_table(raw["programs"], raw["failed"]) + "\n" + sentences(
        f"{raw['batch_size']} rows of {raw['prompt_len']:,} tokens, {raw['new_tokens']} new ones "
        f"each; medians of {raw['repeats']} sweeps in turn."
    )  # fmt: skip


def strategies(raw: dict) -> str:
    """Every draft on every workload, and what a verification takes beside the paper's."""
    results = [r for entry in raw["defaults"].values() for r in entry["results"]]
    theirs = [m.t_verify / m.t_target for path in paper.FILES for m in paper.read_measured(path)
              if m.row["target"].startswith("LLaMA-2-7B") and m.prediction.strategy.gamma == 2
              and m.prediction.w.prefix_len >= 8000]  # fmt: skip
    return strategies_table(raw["defaults"]) + "\n" + sentences(
        f"{sum(r['identical'] for r in results)} of {sum(r['rows'] for r in results)} outputs are "
        f"those of plain decoding. A verification of {results[0]['gamma']} drafts takes "
        f"{span([r['verify_ms'] / r['target_step_ms'] for r in results])} plain steps here. In the "
        f"paper's rows of Llama-2-7B from 8k tokens on, one of 2 drafts takes {span(theirs)}."
    )  # fmt: skip


def mixed(raw: dict) -> str:
    """Prompt lookup, a self-draft, and both, with gamma chosen on the way."""
    entries = [*raw["mixed"].values()]
    n_turns = len(entries[0]["tokens_per_s"]["plain"])
    return mixed_markdown(raw["mixed"]) + "\n" + sentences(
        f"Speedups over plain decoding; medians of {n_turns} runs in turn. "
        f"{sum(e['identical'] for e in entries)} of {sum(e['outputs'] for e in entries)} outputs "
        f"are those of plain decoding."
    )  # fmt: skip


def budgets(raw: dict) -> str:
    """Acceptance by budget, at the smallest gamma, of policies that still select as often."""
    rates: dict[tuple[str, str], dict[int, float]] = {}
    for workload, entry in raw["grid"].items():
        for r in entry["results"]:
            policy = POLICIES.get(r["strategy"])
            if r["gamma"] == 2 and (not policy or policy.reselect_every == r["select_every"]):
                by_budget = rates.setdefault((r["strategy"], workload), {})
                by_budget[r["budget"]] = r["draft_acceptance_rate"]
    rows = []
    for name in dict.fromkeys(name for name, _ in rates):
        cells = [" / ".join(f"{x:.2f}" for x in rates[name, w].values()) for w in raw["grid"]]
        sizes = " / ".join(map(str, rates[name, "recall"]))
        rows.append((name, "" if name == "ngram" else sizes, *cells))
    return table(("strategy", "budget", *raw["grid"]), rows)


def quarters(raw: dict) -> str:
    """Acceptance by quarter of a long answer, by budget."""
    head = ("budget", "first quarter", "second", "third", "fourth")
    rows = [(r["budget"], *(f"{rate:.2f}" for rate in r["acceptance_by_quarter"]))
            for r in raw["quarters"]["results"]]  # fmt: skip
    return table(head, rows)


def kv_dtype(float32: dict, bfloat16: dict) -> str:
    """What K and V of half the size change, plain and drafted."""
    rows = []
    for raw in (float32, bfloat16):
        plain, way = ways(raw)
        rows.append((
            raw["environment"]["kv_dtype"], f"{plain['decode_tokens_per_second']:.0f}",
            f"{way['decode_tokens_per_second']:.0f}", f"{way['speedup']:.2f}",
            f"{plain['target_step_ms']:.1f}", f"{way['draft_step_ms']:.1f}",
            f"{way['verify_ms']:.1f}",
        ))  # fmt: skip
    head = ("K and V", "plain tokens/s", f"{way['name']} tokens/s", "speedup", "T_T ms", "T_D ms",
            f"T_V({way['gamma']}) ms")  # fmt: skip
    return table(head, rows) + "\nThe second line is with `--kv_dtype bfloat16`.\n"


def auto(raw: dict) -> str:
    """Choices, and how far predicted steps are from timed ones."""
    cells, errors = raw["cells"], {}
    for step in (step for cell in cells for step in cell["steps"]):
        error = abs(step["predicted_ms"] / step["ms"] - 1)
        errors.setdefault(step["what"].split("(")[0], []).append(error)
    t, v, d = (errors[what] for what in ("T_T", "T_V", "T_D"))
    hindsight = [cell["auto_over_best_fixed"] for cell in cells]
    least, median = min(c["auto_over_plain"] for c in cells), statistics.median
    return auto_table(cells) + "\n" + sentences(
        f"Auto is at {span(hindsight)} of the choice in hindsight, {median(hindsight):.2f} in the "
        f"median. Where it gains least it is at {least:.2f} of plain decoding. The calibrated cost "
        f"model misses `T_T` by {median(t):.0%} in the median and {max(t):.0%} at most, and `T_V` "
        f"by {median(v):.0%} and {max(v):.0%}. `T_D` is timed: it would be {median(d):.0%} off."
    )  # fmt: skip


def offline(raw: dict) -> str:
    """Refilled rows against static batches."""
    runs = {name: repeats[0] for name, repeats in raw["runs"].items()}
    saved = 1 - runs["refilled, drafted"]["rounds"] / runs["static, drafted"]["rounds"]
    return offline_table(raw) + "\n" + fenced(offline_summary(raw)) + "\n" + sentences(
        f"Refilling saves {saved:.0%} of the rounds. These are the cheap ones, in which most rows "
        "of a static batch have ended and read no KV any more."
    )  # fmt: skip


def load_memory(raw: dict) -> str:
    """Memory that loading takes beside the model."""
    gb = {key: f"{raw[key] / 1e9:.2f} GB" for key in raw if key.endswith("_bytes")}
    return sentences(
        f"Random weights of {raw['model']}'s geometry, {gb['model_bytes']} in {raw['n_shards']} "
        f"shards: the peak is {gb['peak_growth_bytes']}, {raw['extra_in_shards']:.2f} of the "
        "largest shard above the model."
    )


def drawing(raw: dict, way: str) -> str:
    """The name of the picture that `scaling.py` has put beside its result."""
    return f"results/scaling_{raw['environment']['device']}_{raw['date']}.{way}.svg"


def scaling_picture(raw: dict) -> str:
    """The README's picture, and in words what streaming gains with the longest texts."""
    gains = {(c["batch_size"], c["length"]): c["ways"]["streaming"] for c in raw["cells"]}
    sizes, lengths = zip(*gains, strict=True)
    fewest, most, longest = min(sizes), max(sizes), max(lengths)
    one, all_of_it = (f"{gains[B, longest]['row_speedup']:.2f}" for B in (fewest, most))
    picture = f"![Speedup over batch size and length](benchmarks/{drawing(raw, 'streaming')})\n\n"
    return picture + sentences(
        "Points are measured, lines predicted: what a row gains while it runs. With "
        f"{longest:,} tokens that is {one} at batch size {fewest} and {all_of_it} at {most}."
    )


def scaling(raw: dict) -> str:
    """Speedups of streaming and of auto, a line per batch size and a column per length."""
    lengths, parts = sorted({c["length"] for c in raw["cells"]}), []
    for way in ("streaming", "auto"):
        rows: dict[int, dict[int, str]] = {}
        for c in raw["cells"]:
            r = c["ways"][way]
            says = r.get("predicted_speedup", c["predicted"]["speedup"])
            cell = f"{r['row_speedup']:.2f} / {r['batch_speedup']:.2f} ({says:.2f})"
            rows.setdefault(c["batch_size"], {})[c["length"]] = cell
        lines = [(B, *(cells.get(S, "") for S in lengths)) for B, cells in sorted(rows.items())]
        parts.append(table((f"{way}, B", *(f"{S:,} tokens" for S in lengths)), lines))
        parts.append(f"![Speedup of {way}]({drawing(raw, way)})\n")
    outputs, same = (sum(c[key] for c in raw["cells"]) for key in ("outputs", "identical"))
    parts.append(sentences(
        "Each cell: the speedup while a row runs / of the whole batch (as predicted). "
        f"{same} of {outputs} outputs are those of plain decoding."
    ))  # fmt: skip
    return "\n".join(parts)


# The cost model


def cost_model() -> str:
    """The command and what it prints."""
    with redirect_stdout(io.StringIO()) as printed:
        if cost.main(COMMAND.split()[2:]):
            raise ValueError(f"{COMMAND} cannot run")
    return fenced(COMMAND, "bash") + "\n" + fenced(printed.getvalue())


def selection() -> str:
    """What a selection of SnapKV's is expected to take where the table of the command is."""
    model, hw = MODELS["llama-3.1-8b"], HARDWARE["h100"]
    draft, steps = cost.Strategy("snapkv", 3, 2048), []
    for w in (Workload(B, S, 8) for S, B in product(LENGTHS, BATCHES)):
        steps.append(draft.selection_seconds(model, hw, w) / forward_time(model, hw, w).total)
    return sentences(
        f"The cost model expects a selection to take {span(steps, '.1f')} plain steps on 8 H100, "
        "for the lengths and batches of the README's table. That has not been measured."
    )


def paper_errors() -> str:
    """Median errors of the cost model over the paper's rows, by file."""
    rows, wrong, n_rows = [], 0, 0
    for path in paper.FILES:
        measured = paper.read_measured(path)
        wrong, n_rows = wrong + paper.on_the_wrong_side(measured), n_rows + len(measured)
        cells = [f"{statistics.median(e):.1%}" for e in paper.errors(measured).values()]
        rows.append((measured[0].row["gpu"], f"`{path.relative_to(ROOT)}`", len(measured), *cells))
    head = ("preset", "file", "rows", "`T_T`", "drafts", "`T_V`", "speedup")
    return table(head, rows) + "\n" + sentences(
        f"{wrong} of {n_rows} predictions are on the wrong side of 1.0 by more than 0.05."
    )  # fmt: skip


# The demo's checkpoint


def geometry(raw: dict) -> str:
    """The shape of the demo's model."""
    model = load_config(DEMO_CHECKPOINT)
    return sentences(
        f"{total_params(model) / 1e6:.1f}M parameters: {raw['num_hidden_layers']} layers of width "
        f"{raw['hidden_size']}, {raw['num_attention_heads']} heads of {raw['head_dim']} with "
        f"{raw['num_key_value_heads']} KV heads, {raw['vocab_size']:,} sentencepiece tokens, "
        f"{raw['max_position_embeddings']:,} tokens of context. K and V of a token take "
        f"{kv_bytes_per_token(model, 4) / 1024:.0f} KiB in float32."
    )


def schedule(raw: dict) -> str:
    """The phases of a training, with what was measured at the end of each."""
    rows, done = [], 0
    for phase in raw["phases"]:
        start, done = done, done + phase["tokens"]
        seen = [h for h in raw["history"] if start < h["tokens"] <= done]
        if not seen:
            continue
        last, theta = seen[-1], phase["rope_theta"]
        loss = {int(n): f"{value:.2f}" for n, value in last["held_out_loss"].items()}
        rows.append((
            f"{last['tokens'] / 1e6:.1f}M", phase["context"],
            " to ".join(f"{rate:.2f}" for rate in phase["rate"]), f"{phase['recall']:.0%}",
            f"{theta:,.0f}" if theta else "", loss[512],
            loss[phase["context"]] if phase["context"] != 512 else "",
            f"{last['recall_accuracy']:.2f}" if "recall_accuracy" in last else "",
        ))  # fmt: skip
    head = ("tokens seen", "context", "learning rate", "windows that repeat", "RoPE theta to",
            "loss, first 512", "loss, whole context", "recall")  # fmt: skip
    return table(head, rows)


def repeats_itself(text: str, ids: list[int]) -> bool:
    """Whether it ends in a run of one token, or of one line; empty lines do not count."""
    whole = [line for line in text.split("\n") if line.strip()][:-1]
    runs = (whole, RUN_LINES), (ids, RUN_TOKENS)
    return any(len(same) >= n and len({*same[-n:]}) == 1 for same, n in runs)


def endings(before: dict, now: dict) -> str:
    """How many of the demo's greedy texts end in a run."""
    counts = [sum(repeats_itself(row["text"], row["token_ids"]) for row in raw["outputs"])
              for raw in (before, now)]  # fmt: skip
    return sentences(
        f"Of {len(now['outputs'])} greedy texts {counts[1]} end in a run of one token or of one "
        f"line. After the first 21M tokens {counts[0]} did."
    )
