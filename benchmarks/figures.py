"""Every measured number of the documents, from its raw file.

    python benchmarks/figures.py            # write all blocks again, from the newest raw files
    python benchmarks/figures.py --check    # write nothing; exit 1 if a document is out of date

A number that somebody measured is true until somebody measures again. So no document has one of its
own. Between two comments stands what a function of `blocks.py` makes of raw files::

    <!-- figures: floor -->
    | context | read | floor | ...
    From `benchmarks/results/floor_cpu_2026-11-20.json`, by `python benchmarks/floor.py`.
    <!-- end -->

`FIGURES` says which function, and of which files. A raw file carries the day of its measurement in
its name, and the newest one counts. To bring the documents up to date: measure, and run this. What
a block's sentences claim beyond their numbers is not checked: read them again then.

What stands outside of the blocks is checked too. A number with a unit or with a decimal point was
measured by someone. `measured_numbers` finds these; ALLOWED has the few that were not. Code in Bash
and Python is not searched: tests run it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import blocks
from config import lookup_name

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "checkpoints/README.md",
    "checkpoints/demo/README.md",
)
BLOCK = re.compile(r"(?<=<!-- figures: )(\w+) -->\n(.*?)(?=<!-- end -->)", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_TEXT = re.compile(r"https?://[^ )]+|arXiv \d+\.\d+|`[^`]*`")
MEASURED = re.compile(
    r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?: ?%|x\b| of \d+\b| (?:ms|s|seconds?|minutes?|hours?|rounds?|"
    r"times|percent|nats|tokens/s|tokens per second|[KMGT]i?B)\b)"
    r"|(?<![\w.,-])\d[\d,]*\.\d+(?![\w.]*\d)"
)
ALLOWED = (  # what looks measured and is not
    "Llama 3, 3.1, 3.2",  # names of models
    "transformers 5.23",  # a version
)


class Figure(NamedTuple):
    """A block: the function that writes it, from what, and the command that measured that."""

    write: Callable[..., str]  # of the contents of the sources
    sources: tuple[str, ...] = ()  # names in results/, without date; or paths, which have a slash
    command: str = ""  # where the raw files do not say it


DEMO = "python generate.py --json FILE"
TEXTS_BEFORE = "benchmarks/results/texts_before_2026-11-30.json"  # with the model of 21M tokens
TRAINED = "2026-11-30"  # the demo's model, last: what is older shows another one's texts
OF_TEXTS = ("budgets", "quarters", "strategies", "mixed", "kv_dtype", "offline", "formula")
FIGURES = {
    "scaling_picture": Figure(blocks.scaling_picture, ("scaling_cpu",)),
    "demo": Figure(blocks.demo, ("demo_cpu",), DEMO),
    "step_bytes": Figure(blocks.step_bytes),
    "one_round": Figure(blocks.one_round, ("one_round_cpu",)),
    "formula": Figure(blocks.formula, ("demo_cpu", "offline_cpu"), DEMO),
    "cost_model": Figure(blocks.cost_model),
    "selection": Figure(blocks.selection),
    "floor": Figure(blocks.floor, ("floor_cpu",)),
    "peers": Figure(blocks.peers, ("peers_cpu",)),
    "strategies": Figure(blocks.strategies, ("strategies_defaults_cpu",)),
    "mixed": Figure(blocks.mixed, ("strategies_mixed_cpu",)),
    "budgets": Figure(blocks.budgets, ("strategies_grid_cpu",)),
    "quarters": Figure(blocks.quarters, ("strategies_quarters_cpu",)),
    "kv_dtype": Figure(
        blocks.kv_dtype,
        ("demo_streaming_cpu", "demo_streaming_bf16kv_cpu"),
        "python generate.py --draft streaming --speculate_k 5 --compare --json FILE",
    ),
    "auto": Figure(blocks.auto, ("auto_cpu",)),
    "offline": Figure(blocks.offline, ("offline_cpu",)),
    "scaling": Figure(blocks.scaling, ("scaling_cpu",)),
    "paper": Figure(blocks.paper_errors),
    "load_memory": Figure(blocks.load_memory, ("load_memory",)),
    "geometry": Figure(blocks.geometry, ("checkpoints/demo/config.json",)),
    "schedule": Figure(blocks.schedule, ("checkpoints/demo/training.json",)),
    "schedule_draft": Figure(blocks.schedule, ("checkpoints/demo-draft/training.json",)),
    "endings": Figure(
        blocks.endings,
        (TEXTS_BEFORE, "texts_cpu"),
        "python generate.py --draft ngram --max_new_tokens 192 --json FILE",
    ),
}


def newest(source: str) -> Path:
    """The raw file of a source that was measured last. FileNotFoundError if there is none."""
    if "/" in source:
        return ROOT / source
    days = sorted(RESULTS.glob(f"{source}_????-??-??.json"))
    if not days:
        raise FileNotFoundError(f"{RESULTS} has no {source}_YYYY-MM-DD.json")
    return days[-1]


def body(name: str) -> str:
    """What stands in a block: what its function says, then where that is from.

    ValueError if the name is unknown, FileNotFoundError if there is no raw file.
    """
    figure = lookup_name(FIGURES, name, "block")
    paths = [newest(source) for source in figure.sources]
    raws = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    text = figure.write(*raws).rstrip() + "\n"
    if paths:
        apart = text.splitlines()[-1].startswith(("|", "```"))  # else in the paragraph's end
        commands = dict.fromkeys(raw.get("command", figure.command) for raw in raws)
        files, by = (" and ".join(f"`{word}`" for word in words if word) for words in (
            [str(path.relative_to(ROOT)) for path in paths],
            [re.sub(" --out [^ ]+", "", command) for command in commands],
        ))  # fmt: skip
        old = [path for path in paths if name in OF_TEXTS and path.stem[-10:] < TRAINED]
        which = "" if len(old) == len(paths) else "the older file "
        model = f", {which}with the demo's model before its last training" if old else ""
        text += "\n" * apart + f"From {files}{by and f', by {by}'}{model}.\n"
    return text


def rewritten(text: str, write: Callable[[str], str] = body) -> str:
    """The document with all of its blocks as they should be. ValueError if one does not end."""
    if text.count("<!-- figures:") != len(BLOCK.findall(text)):
        raise ValueError("a block of figures has no name, or no <!-- end --> before the next one")
    return BLOCK.sub(lambda block: f"{block[1]} -->\n{write(block[1])}", text)


def measured_numbers(text: str) -> Iterator[str]:
    """Numbers outside of blocks that look measured, and what stands around them."""
    text = BLOCK.sub("", text)
    text = FENCE.sub(lambda fence: "" if fence[1] in ("bash", "python") else fence[2], text)
    text = NOT_TEXT.sub("", text)
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    text = " ".join(text.split())
    for number in MEASURED.finditer(text):
        yield f"{number[0]!r} in {text[max(number.start() - 30, 0) : number.end() + 30]!r}"


def complaints(text: str, write: Callable[[str], str] = body) -> list[str]:
    """What is wrong with the numbers of a document; the same errors as of `rewritten`."""
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(rewritten(text, write)), strict=True)
    stale = [old[1] for old, new in pairs if old[2] != new[2]]
    return [f"block {name} is not what its raw files give" for name in stale] + [
        f"{found} is outside of all blocks" for found in measured_numbers(text)
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if something is wrong with a document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, wrong = parser.parse_args(argv).check, []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        try:
            if not check and (new := rewritten(text)) != text:
                path.write_text(text := new, encoding="utf-8")
                print(f"wrote {name}")
            wrong += [f"{name}: {complaint}" for complaint in complaints(text)]
        except (ValueError, OSError) as e:
            wrong.append(f"{name}: {e}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
