"""The flags of `generate.py`, checked. A new flag is one line in `Options`.

A field's type says how its flag is parsed, its default stands there and nowhere else. Nobody writes
into Options once they are made, and only the command sees them: what is below it is told values.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from checkpoint import DEMO_CHECKPOINT, DTYPES, KV_DTYPES
from config import is_random
from cost_model import Parser
from drafters import check_name
from files import check_writable, write_json
from policies import POLICIES, Strategy
from quantize import KINDS
from sampling import Sampling

# What --draft auto chooses from. Self-drafts alone are not: mixed accepts what they do, and more.
AUTO_POLICIES = ("ngram", "mixed")
SAMPLING, STRATEGY = Sampling(), Strategy()  # whose defaults are the flags'
# The demo: new tokens of a row, and after the greedy text a sampled one. What else leaves it.
DEMO_NEW_TOKENS, DEMO_TEMPERATURE = 64, 0.8
HOW = (
    "draft_checkpoint_path", "draft", "speculate_k", "draft_budget", "draft_weights", "n_sink",
    "obs_window", "reselect_every", "compare", "check_lossless", "profile", "explain",
)  # fmt: skip
EXPLAINED = 3  # rounds


def flag(default: object, meaning: str | None = None, *names: str, **how: Any) -> Any:
    """A field of Options: its default, what `--help` says, other names, more for argparse."""
    return field(default=default, metadata={"names": names, "how": {"help": meaning, **how}})


def int_or_auto(text: str) -> int | str:
    """A number of drafts, or the word. ArgumentTypeError for all else."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor auto") from None


@dataclass(frozen=True, slots=True)
class Options:
    """The flags. ValueError for values and combinations that make no sense."""

    checkpoint_path: Path = flag(DEMO_CHECKPOINT, "Hugging Face directory; or random:llama-3.1-8b")
    draft_checkpoint_path: Path | None = flag(None, "draft with this smaller model of its own")
    prompt: tuple[str, ...] = flag((), "text; an integer N: N random tokens, others in every row")
    prompt_file: tuple[Path, ...] = flag((), "UTF-8 text (repeatable)")
    prompts: Path | None = flag(None, '.jsonl, an object with "prompt" per line')
    output: Path | None = flag(None, "with --prompts: write each result to this .jsonl when it is "
                                     "done; what is there already is kept")  # fmt: skip
    data_parallel: bool = flag(False, "with --output: share the prompts with other processes, each "
                                      "with a model of its own (torchrun)")  # fmt: skip
    skip_bad: bool = flag(False, "with --output: record lines that cannot be used, do the others")
    order: str | None = flag(None, "with --output: which prompt gets a row; default: first",
                             choices=("first", "longest"), metavar=None)  # fmt: skip
    max_gap: float | None = flag(None, "with --output: seconds that running rows wait for the "
                                       "prompt of another one; default: 2")  # fmt: skip
    batch_size: int | None = flag(None, "rows; prompts are repeated to fill them. With --output: "
                                        "refilled, at most 16 by default")  # fmt: skip
    max_new_tokens: int = flag(256, f"of every row; default: 256, of the demo {DEMO_NEW_TOKENS}")
    max_context: int | None = flag(None, "most tokens of prompt and answer; default: the model's")
    temperature: float = flag(SAMPLING.temperature, "0: greedy")
    top_k: int | None = flag(SAMPLING.top_k)
    top_p: float | None = flag(SAMPLING.top_p)
    seed: int = flag(1234)
    ignore_eos: bool = flag(False, "go on to the limit")
    draft: str = flag("auto", f"how to draft: auto, none, ngram, {', '.join(POLICIES)}; "
                              "with --draft_checkpoint_path also full")  # fmt: skip
    speculate_k: int | str = flag("auto", "draft tokens per round; 0: plain decoding",
                                  "--gamma", type=int_or_auto, metavar="N|auto")  # fmt: skip
    draft_budget: int = flag(STRATEGY.budget, "tokens of KV that a draft reads per row, with sinks")
    draft_weights: str = flag("auto", "of self-speculation: auto, same, or a copy of the target's "
                                      "in bf16, fp8 or int8", choices=("auto", *KINDS),
                              metavar=None)  # fmt: skip
    n_sink: int = flag(STRATEGY.n_sink)
    obs_window: int | None = flag(None, "newest tokens observed; default: the policy's own")
    reselect_every: int | None = flag(None, "rounds until the KV is selected again; 0: never")
    compare: bool | None = flag(None, "run plain decoding too")
    check_lossless: bool = flag(False, "compare, and exit 1 on a difference")
    explain: int | None = flag(None, f"show the next N rounds of row 0 as text ({EXPLAINED}); runs "
                                     "eagerly", nargs="?", const=EXPLAINED)  # fmt: skip
    exact: bool = flag(False, "bit for bit plain decoding's output, in bfloat16 too: every plain "
                              "step is padded to the shape of a verification")  # fmt: skip
    compile: bool = flag(True)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu")
    dtype: str | None = flag(None, "default: float32 on the CPU, bfloat16 on a GPU",
                             choices=DTYPES, metavar=None)  # fmt: skip
    kv_dtype: str | None = flag(None, "of the KV caches; default: that of the weights",
                                choices=KV_DTYPES, metavar=None)  # fmt: skip
    profile: Path | None = flag(None, "write a Chrome trace of the decoding to this file")
    chat: bool = flag(False, "put prompts into the checkpoint's chat template")
    system: str | None = flag(None, "with --chat: the system message")
    interactive: bool = flag(False, "prompts from standard input; with --chat, a conversation")
    json: str | None = flag(None, "write numbers and outputs to this file; -: standard output")

    def __post_init__(self) -> None:
        for wrong, why in self.refusals():
            if wrong:
                raise ValueError(why)
        if self.draft != "auto":
            check_name(self.draft)

    def refusals(self) -> tuple[tuple[object, str], ...]:
        """What may be wrong with the values and their combinations, and what is said of it."""
        rows_fit = self.batch_size is None or 1 <= self.batch_size < 2**31
        context_fits = self.max_context is None or self.max_context >= 2
        drafts = "needs a draft: not --draft none, not --speculate_k 0"
        measured = self.compare or self.check_lossless or self.profile or self.json is not None
        return (
            (self.max_new_tokens < 1, f"--max_new_tokens {self.max_new_tokens} must be at least 1"),
            (not rows_fit, f"--batch_size {self.batch_size} must be in 1..2**31 - 1"),
            (self.n_sources > 1,
             "give one of --prompt, --prompt_file, --prompts and --interactive"),
            (self.check_lossless and not self.drafts, f"--check_lossless {drafts}"),
            (self.compare and not self.drafts, f"--compare {drafts}"),
            (self.exact and not self.drafts, f"--exact {drafts}"),
            (self.draft_checkpoint_path and not self.drafts, f"--draft_checkpoint_path {drafts}"),
            (self.lower_weights and not self.drafts, f"--draft_weights {drafts}"),
            (self.interactive and (self.compares or self.json or self.profile),
             "--interactive has no --compare, --check_lossless, --json or --profile"),
            (self.explain is not None and self.explain < 1,
             f"--explain {self.explain} must be at least 1"),
            (self.explain and not self.drafts, f"--explain {drafts}"),
            (self.explain and (self.output or self.interactive or measured),
             "--explain has no --output, --interactive, --json, --compare, --check_lossless or "
             "--profile"),
            (self.check_lossless and not self.compares,
             "--check_lossless needs the plain run that --no-compare leaves out"),
            (self.output and not self.prompts, "--output needs --prompts"),
            (self.output and self.profile, "--output has no --profile"),
            (self.data_parallel and not self.output, "--data_parallel needs --output"),
            (self.data_parallel and self.compares, "--data_parallel has no --compare"),
            (not self.output and (self.skip_bad or self.order or self.max_gap is not None),
             "--skip_bad, --order and --max_gap need --output"),
            (self.max_gap is not None and not self.max_gap > 0,
             f"--max_gap {self.max_gap} must be a number of seconds above 0"),
            (not 0 <= self.seed < 2**63, f"--seed {self.seed} must be in 0..2**63 - 1"),
            ((self.reselect_every or 0) < 0,
             f"--reselect_every {self.reselect_every} must be at least 0 (0: never)"),
            (not context_fits, f"--max_context {self.max_context} must be at least 2"),
            (self.interactive and is_random(self.checkpoint_path),
             "--interactive needs a tokenizer, which random weights do not have"),
            (self.chat and not self.n_sources,
             "--chat needs a --prompt, --prompt_file, --prompts or --interactive"),
            (self.system is not None and not self.chat,
             "--system needs --chat: without a template there is no place for it"),
        )  # fmt: skip

    @property
    def n_sources(self) -> int:
        """How many kinds of prompts were given; 0: the demo's own are meant."""
        return sum(map(bool, (self.prompt, self.prompt_file, self.prompts, self.interactive)))

    @property
    def is_demo(self) -> bool:
        """Whether every way to draft is shown: nothing says what to continue, nor how."""
        defaults = {f.name: f.default for f in fields(Options)}
        return not self.n_sources and all(getattr(self, name) == defaults[name] for name in HOW)

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """How the rows sample, one run after the other. ValueError for impossible settings."""
        asked = Sampling(self.temperature, self.top_k, self.top_p)
        too = (Sampling(DEMO_TEMPERATURE),) if self.is_demo and asked.greedy else ()
        return (asked, *too)

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted at all."""
        return self.draft != "none" and self.speculate_k != 0

    @property
    def weighs(self) -> bool:
        """Whether prompt lookup alone, a part of the draft that is named, may take its place."""
        free = self.speculate_k == "auto" and not self.draft_checkpoint_path
        return self.draft == "mixed" and free

    @property
    def lower_weights(self) -> str:
        """The kind of low-precision draft weights that was asked for; none: an empty name."""
        return self.draft_weights if self.draft_weights not in ("auto", "same") else ""

    @property
    def compares(self) -> bool:
        """Whether plain decoding runs too: when asked for, and on the demo's prompts."""
        if self.compare is not None:
            return self.compare
        return self.check_lossless or (self.drafts and not self.n_sources)

    def gammas(self, worthwhile: tuple[int, ...]) -> tuple[int, ...]:
        """Draft lengths that may be used: the one that was asked for, or those worth compiling."""
        return (self.speculate_k,) if isinstance(self.speculate_k, int) else worthwhile

    def strategies(self, gamma: int) -> list[Strategy]:
        """What the flags allow: one way to draft, or all that --draft auto chooses from.

        ValueError if one is impossible. What has nothing to reselect is then not asked to.
        """
        if not self.drafts:
            return [Strategy(gamma=gamma)]
        several, found = self.draft == "auto" or self.weighs, []
        for policy in AUTO_POLICIES if several else (self.draft,):
            reselects = policy in POLICIES and POLICIES[policy].reselect_every
            every = self.reselect_every if reselects or not several else None
            sizes = self.draft_budget, self.n_sink, self.obs_window
            found.append(Strategy(policy, gamma, *sizes, every))
        return found


def parse_args(argv: list[str] | None, description: str = "") -> Options:
    """The flags of a command line; None: this process's own. ValueError for unusable ones."""
    p = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Options):
        kind = get_args(f.type)[0] if get_args(f.type) else f.type
        how: dict[str, Any] = {"type": kind, "metavar": f.name.split("_")[-1].upper()}
        if kind is bool:
            how = {"action": "store_true" if f.default is False else argparse.BooleanOptionalAction}
        elif f.default == ():
            how["action"] = "append"
        p.add_argument(f"--{f.name}", *f.metadata["names"], **how | f.metadata["how"])
    given: dict[str, Any] = vars(p.parse_args(argv))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    options = Options(**given)
    if options.is_demo and "max_new_tokens" not in given:
        return replace(options, max_new_tokens=DEMO_NEW_TOKENS)
    return options


def write_result(o: Options, result: dict) -> None:
    """Where --json says, if anywhere. OSError if it cannot be written."""
    if o.json == "-":
        print(json.dumps(result, indent=2))
    elif o.json:
        write_json(result, Path(o.json))


def check_targets(o: Options) -> None:
    """ValueError for files and streams that cannot be used at the end of a run."""
    if sys.stdout is None or (o.interactive and sys.stdin is None):
        raise ValueError(
            "standard output must be open, and with --interactive standard input; for no output "
            "write > /dev/null"
        )
    if o.json == "":
        raise ValueError("--json needs the name of a file")
    targets = {"profile": o.profile, "json": Path(o.json) if o.json not in (None, "-") else None}
    given = {name: path for name, path in targets.items() if path is not None}
    for name, path in given.items():
        try:
            check_writable(path)
        except OSError as e:
            raise ValueError(f"--{name}: cannot write {path}: {e.strerror}") from None
    owners: dict[Path, str] = {}
    for name, file in {**targets, "output": o.output, "prompts": o.prompts}.items():
        if file is not None and owners.setdefault(file.resolve(), name) != name:
            other = owners[file.resolve()]
            raise ValueError(f"--{other} and --{name} are the same file, {file}; give two")
