"""One round on the demo, token by token: what is drafted, what the model says, what is kept.

    python benchmarks/one_round.py      # seconds; nothing is timed

Three of the demo's prompts, greedy, drafted by streaming with its defaults. From the sixth round on
the first one is recorded in which a row keeps all drafts and another row only some: both endings of
a round can be seen there. The README shows it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.saving import save
from checkpoint import DEMO_CHECKPOINT, load_model
from measure import environment
from policies import Strategy
from prompts import DEMO_LONGEST, DEMO_ROWS, demo_prompts
from sampling import Sampling
from spec_decode import Engine
from tokenizer import TextStream, Tokenizer, load_tokenizer

STRATEGY, FIRST, LAST = Strategy("streaming"), 6, 40  # rounds among which one is chosen


def pieces(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    """The text of each token as it follows the tokens before."""
    stream = TextStream(tokenizer, before)
    return [stream.feed([i]) for i in ids]


def round_of_rows(engine: Engine, tokenizer: Tokenizer, draft: Tensor, logits: Tensor) -> list:
    """Each row of a round that is verified and not committed: draft [B, gamma], logits of it."""
    n_accepted = engine.accept(draft, logits)[0].tolist()
    rows = []
    for b, kept in enumerate(n_accepted):
        decided = engine.batch.tokens[b, : engine.batch.seq_len[b]].tolist()
        drafted, says = draft[b].tolist(), logits[b].argmax(dim=-1).tolist()
        rows.append({
            "row": b,
            "decided": len(decided),
            "drafted": pieces(tokenizer, decided, drafted),
            "model_says": pieces(tokenizer, decided, drafted[:kept] + [says[kept]]),
            "kept": kept,
            "new": kept + 1,
        })  # fmt: skip
    return rows


def telling(rows: list[dict]) -> bool:
    """Whether a row keeps all drafts, and another one some of them."""
    kept, gamma = [r["kept"] for r in rows], len(rows[0]["drafted"])
    return gamma in kept and any(0 < n < gamma for n in kept)


@torch.inference_mode()
def find_round(engine: Engine, tokenizer: Tokenizer) -> dict:
    """The first round of a prefilled batch that is telling. RuntimeError if none is by LAST."""
    for number in range(1, LAST + 1):
        if number >= FIRST:
            engine.refresh()
            draft = engine.draft(engine.gamma)
            rows = round_of_rows(engine, tokenizer, draft, engine.verify(draft))
            if telling(rows):
                return {"round": number, "rows": rows}
        engine.round(engine.gamma)
    raise RuntimeError(f"in none of the rounds {FIRST} to {LAST} do rows differ as is asked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    model = load_model(DEMO_CHECKPOINT, torch.device("cpu"), torch.float32)
    prompts = demo_prompts(tokenizer, DEMO_ROWS, DEMO_LONGEST)[: args.rows]
    limits = [LAST * (STRATEGY.gamma + 1)] * len(prompts)
    engine = Engine(model, len(prompts), DEMO_LONGEST + limits[0], STRATEGY, Sampling())
    engine.prefill(prompts, limits)
    result = {
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
        "environment": environment(engine), "plan": STRATEGY.describe(),
    } | find_round(engine, tokenizer)  # fmt: skip
    save(result, "one_round_cpu", args.out)


if __name__ == "__main__":
    main()
