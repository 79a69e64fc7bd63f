"""Prompts: from the command line, from files, or the demo's own."""

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

from chat import Chat
from tokenizer import Tokenizer, surrogate

DEMO_MODULES = (  # standard modules that the demo checkpoint was not trained on
    "shutil", "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum",
    "inspect", "ipaddress", "logging", "optparse", "pdb", "pickle", "statistics", "subprocess",
    "tarfile", "threading", "typing", "zipfile",
)  # fmt: skip
DEMO_ROWS, DEMO_SHORTEST, DEMO_LONGEST = 16, 3000, 3840  # rows, tokens


def module_source(name: str) -> str:
    """Source text of a top-level standard module, found without importing it."""
    return Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")


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
    ids = {name: tokenizer.encode(module_source(name)) for name in dict.fromkeys(names)}
    return [ids[name][:length] for name, length in zip(names, lengths, strict=True)]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put at its beginning."""
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


def synthetic_length(text: str) -> int:
    """N of a --prompt that is an integer. ValueError if no model has so long a context."""
    n = int(text) if len(text) < 10 else 10**9
    if n > 10**7:
        raise ValueError(f"--prompt {text}: a synthetic prompt of so many tokens fits no model")
    return n


def encode_prompt(
    text: str, args: argparse.Namespace, tokenizer: Tokenizer, chat: Chat | None
) -> list[int]:
    """Tokens of a prompt, none of an empty one."""
    if chat and text:
        return chat.start(text, args.system)
    return tokenizer.encode(text) if text else []


def read_prompts(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    chat: Chat | None,
    max_context: int,
    check_size: Callable[[int, int], None] = lambda n_rows, n_tokens: None,
) -> list[list[int]]:
    """Token ids of every row of the batch; with --interactive, which has none yet, empty ones.

    `check_size` is told the rows and the tokens of the longest, answer included, before rows are
    made, and raises ValueError if they cannot fit. A --prompt that is an integer N stands for N
    random tokens, different ones in every row.
    """
    longest = max_context - args.max_new_tokens  # prompt tokens that leave room for the answer
    if longest < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} does not fit into the context of "
            f"{max_context} tokens"
        )
    if args.interactive:
        n_rows = args.batch_size or 1
        check_size(n_rows, max_context)
        return [[]] * n_rows
    if not (args.prompt or args.prompt_file or args.prompts):
        n_rows, longest = args.batch_size or DEMO_ROWS, min(DEMO_LONGEST, longest)
        check_size(n_rows, longest + args.max_new_tokens)
        return demo_prompts(tokenizer, n_rows, longest)
    texts = read_jsonl(args.prompts) if args.prompts else args.prompt
    texts = texts + [read_text(path) for path in args.prompt_file]
    prompts: list[list[int] | int] = [  # an integer: of so many random tokens
        synthetic_length(text)
        if args.prompt and text.isdecimal()
        else encode_prompt(text, args, tokenizer, chat)
        for text in texts
    ]
    lengths = [prompt if isinstance(prompt, int) else len(prompt) for prompt in prompts]
    for number, length in enumerate(lengths):
        if not length:
            raise ValueError(f"prompt {number} is empty; nothing can follow from it")
        if length > longest:
            raise ValueError(
                f"prompt {number} has {length} tokens; the context of {max_context} "
                f"leaves room for {longest} with --max_new_tokens {args.max_new_tokens}"
            )
    n_rows = args.batch_size or len(prompts)
    if n_rows < len(prompts):
        raise ValueError(f"--batch_size {n_rows} is less than the {len(prompts)} prompts given")
    check_size(n_rows, max(lengths) + args.max_new_tokens)
    generator = torch.Generator().manual_seed(args.seed)

    def row_of(prompt: list[int] | int) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return torch.randint(tokenizer.vocab_size, (prompt,), generator=generator).tolist()

    return [row_of(prompts[row % len(prompts)]) for row in range(n_rows)]
