"""Hold a checkpoint against `transformers` and record what our own tests compare with.

    pip install -r requirements.txt transformers      # in a throwaway environment
    python scripts/check_demo.py                      # checks; writes tests/demo_logits.json

Loads the directory with AutoModelForCausalLM, records the logits after a held-out prompt and its
greedy continuation of 64 tokens, and compares them with this program's own in the same process.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import DEMO_CHECKPOINT, load_model
from policies import Strategy
from prompts import demo_prompts
from refill import generate
from sampling import Sampling
from spec_decode import Engine
from tokenizer import load_tokenizer


@torch.inference_mode()
def main() -> None:
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    text = Path(__file__).read_text(encoding="utf-8")
    their_tokenizer = AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)
    same_ids = their_tokenizer(text).input_ids == tokenizer.encode(text)
    prompt = demo_prompts(tokenizer, 1, 300)[0]
    ids = torch.tensor([prompt])
    theirs = AutoModelForCausalLM.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32).eval()
    expected = theirs(ids).logits[0]
    greedy = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=-1)[
        0, ids.shape[1] :
    ]

    ours = load_model(DEMO_CHECKPOINT, torch.device("cpu"), torch.float32)
    got = ours(ids, torch.arange(ids.shape[1])[None])[0]
    error = ((got - expected).abs().max() / expected.std()).item()
    engine = Engine(ours, 1, len(prompt) + 64, Strategy(), Sampling())
    outputs, _ = generate(engine, [prompt], 64)
    same = outputs[0] == greedy.tolist()
    print(f"transformers {__version__}: largest logit difference {error:.1e} of their spread over "
          f"{len(prompt)} positions; 64 greedy tokens {'equal' if same else 'DIFFER'}; "
          f"token ids of a text {'equal' if same_ids else 'DIFFER'}")  # fmt: skip
    if error > 1e-4 or not (same and same_ids):
        sys.exit(1)
    record = {
        "transformers": __version__,
        "token_ids": prompt,
        "last_logits": [round(x, 5) for x in expected[-1].tolist()],
        "greedy_64": greedy.tolist(),
    }
    (ROOT / "tests" / "demo_logits.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
