"""Where prompts come from: texts, files, lines of JSON, random tokens, or the demo's own.

A batch has a row for every prompt; more rows repeat them in order. A text that is an integer N
stands for N random tokens, different ones in every row.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tokenizer import Tokenizer, surrogate

DEMO_MODULES = (  # standard modules that the demo checkpoint was not trained on
    "shutil", "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum",
    "inspect", "ipaddress", "logging", "optparse", "pdb", "pickle", "statistics", "subprocess",
    "tarfile", "threading", "typing", "zipfile",
)  # fmt: skip
DEMO_ROWS, DEMO_SHORTEST, DEMO_LONGEST = 16, 3000, 3840  # rows, tokens
MAX_SYNTHETIC = 10**7  # tokens, more than any model has of context

Prompt = list[int] | int  # token ids; an integer: that many random ones, drawn for each row


def module_source(name: str) -> str:
    """Source text of a top-level standard module, found without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin).read_text(encoding="utf-8")


def demo_lengths(n_rows: int, longest: int = DEMO_LONGEST) -> list[int]:
    """Different prompt lengths of at most `longest` tokens.

    Long and short rows alternate: threads share the rows of a batch in contiguous parts.
    """
    shortest = longest * DEMO_SHORTEST // DEMO_LONGEST
    ranks = [n_rows - 1 - row // 2 if row % 2 else row // 2 for row in range(n_rows)]
    lengths = [shortest + (longest - shortest) * rank // max(n_rows - 1, 1) for rank in ranks]
    return [max(length, 1) for length in lengths]


def demo_prompts(tokenizer: Tokenizer, n_rows: int, longest: int) -> list[list[int]]:
    """Beginnings of standard modules, cut to the demo's lengths."""
    names = [DEMO_MODULES[row % len(DEMO_MODULES)] for row in range(n_rows)]
    lengths = demo_lengths(n_rows, longest)
    n = 8 * longest + 99  # characters; `longest` tokens of a program have fewer
    ids = {name: tokenizer.encode(module_source(name)[:n]) for name in dict.fromkeys(names)}
    return [ids[name][:length] for name, length in zip(names, lengths, strict=True)]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put first. Else ValueError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None


def read_jsonl(path: Path) -> list[str]:
    """The prompts of a file with a JSON object per line; ValueError names a line that is not."""
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str) or surrogate(text) is not None:
            raise ValueError(f'{path}, line {number}: not an object with a text "prompt"')
        texts.append(text)
    if not texts:
        raise ValueError(f'{path} has no prompts: a line is {{"prompt": "..."}}')
    return texts


def read_prompts(
    texts: Sequence[str],
    files: Sequence[Path],
    jsonl: Path | None,
    encode: Callable[[str], list[int]],
) -> list[Prompt]:
    """All prompts in order, encoded. An integer is a length among `texts`, a text in a file.

    OSError or ValueError for a file that cannot be used.
    """
    prompts: list[Prompt] = [
        synthetic_length(text) if text.isdecimal() else encode(text) for text in texts
    ]
    read = read_jsonl(jsonl) if jsonl else []
    return prompts + [encode(text) for text in [*read, *map(read_text, files)]]


def synthetic_length(text: str) -> int:
    """N of a --prompt that is an integer. ValueError if no model has a context of N tokens."""
    n = int(text) if len(text) < 10 else MAX_SYNTHETIC + 1
    if n > MAX_SYNTHETIC:
        raise ValueError(f"--prompt {text}: a synthetic prompt of so many tokens fits no model")
    return n


def longest_prompt(max_context: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have beside its answer. ValueError if that is none."""
    if max_new_tokens >= max_context:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens} does not fit into the context of "
            f"{max_context} tokens"
        )
    return max_context - max_new_tokens


def check_lengths(prompts: list[Prompt], max_context: int, max_new_tokens: int) -> None:
    """ValueError names a prompt that is empty, and one that leaves no room for its answer."""
    longest = longest_prompt(max_context, max_new_tokens)
    for number, prompt in enumerate(prompts):
        length = prompt if isinstance(prompt, int) else len(prompt)
        if not length:
            raise ValueError(f"prompt {number} is empty; nothing can follow from it")
        if length > longest:
            raise ValueError(
                f"prompt {number} has {length} tokens; the context of {max_context} "
                f"leaves room for {longest} with --max_new_tokens {max_new_tokens}"
            )


def fill_rows(prompts: list[Prompt], n_rows: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of every row. ValueError if there are fewer rows than prompts."""
    if n_rows < len(prompts):
        raise ValueError(f"--batch_size {n_rows} is less than the {len(prompts)} prompts given")
    generator = torch.Generator().manual_seed(seed)

    def row_of(prompt: Prompt) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return torch.randint(vocab_size, (prompt,), generator=generator).tolist()

    return [row_of(prompts[row % len(prompts)]) for row in range(n_rows)]
