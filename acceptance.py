"""How many drafts are kept: the one number of the cost model that has to be measured. No torch.

Each draft is accepted with probability alpha, given that those before it were. A round of gamma
drafts then yields Omega tokens, the target's own included:

    Omega(gamma, alpha) = 1 + alpha + alpha^2 + .. + alpha^gamma

    gamma = 4     alpha 0.5: 1.94    0.7: 2.77    0.8: 3.36    0.9: 4.10

Runs report tokens per round; `alpha_of` turns them back into alpha, so that a run with one gamma
predicts those with others. Alpha depends on the text, the models, the policy and its budget, and
hardly on the length. So it is a table: the paper's, or your own runs'.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from config import lookup_name

MAX_COUNT = 10**9  # of anything that is counted in what a user gives
DRAFTS = ("streaming", "snapkv", "chunks", "mixed", "full", "ngram")  # whose cost is known


def omega(gamma: int, alpha: float) -> float:
    """Expected tokens of a round, the target's own included (arXiv 2211.17192, eq. 1).

    A draft is accepted with probability alpha, given that those before it were.
    """
    return sum(alpha**i for i in range(gamma + 1))


def alpha_of(tokens_per_round: float, gamma: int) -> float:
    """The acceptance at which omega is `tokens_per_round`; ValueError outside 1..gamma + 1."""
    if not 1 <= tokens_per_round <= gamma + 1:
        raise ValueError(f"{tokens_per_round} tokens per round is not in 1..{gamma + 1}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if omega(gamma, middle) < tokens_per_round else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One measured acceptance. ValueError for a budget or length that is no such number."""

    policy: str
    own_model: bool  # a draft model of its own
    budget: int
    prefix_len: int
    alpha: float
    source: str

    def __post_init__(self) -> None:
        for field, low in (("budget", 0), ("prefix_len", 1)):
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= MAX_COUNT:
                raise ValueError(f"{field} {value!r} must be a whole number in {low}..{MAX_COUNT}")


# Streaming: tokens per round of the paper's Table 3 (gamma = 2, PG-19) as alpha. SnapKV: the rate
# at which the project's GPU goals are set, from the same paper.
ACCEPTANCE = (
    Acceptance("streaming", False, 512, 8000, 0.833, "arXiv 2408.11049, table 3b, 8k"),
    Acceptance("streaming", False, 512, 32000, 0.823, "arXiv 2408.11049, table 3b, 32k"),
    Acceptance("streaming", False, 512, 100000, 0.804, "arXiv 2408.11049, table 3c, 100k"),
    Acceptance("streaming", True, 512, 8000, 0.696, "arXiv 2408.11049, table 3a, 8k"),
    Acceptance("streaming", True, 512, 32000, 0.692, "arXiv 2408.11049, table 3a, 32k"),
    Acceptance("snapkv", False, 2048, 32000, 0.895, "arXiv 2408.11049, SnapKV at 32k"),
)


def read_acceptance(path: Path) -> Acceptance:
    """That of a run with one fixed draft, as `generate.py --json` wrote it; else ValueError."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        plan, stats = run["plan"], run["speculative"]
        if "predicted_speedup" in plan:
            raise ValueError("its plan has predicted_speedup")
        lookup_name(dict.fromkeys(DRAFTS), plan["strategy"], "draft")
        return Acceptance(
            plan["strategy"],
            "draft_model" in run,
            plan.get("draft_budget", 0),
            max(row["prompt_length"] for row in run["outputs"]),
            alpha_of(stats["mean_acceptance_length"], plan["gamma"]),
            str(path),
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path}: not the JSON of generate.py with a fixed --draft and --speculate_k "
            f"({type(e).__name__}: {e})"
        ) from None
