"""Prompts: from the command line, from files, or the demo's own."""

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from chat import Chat
from tokenizer import Tokenizer

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
    return [
        tokenizer.encode(module_source(name))[:length]
        for name, length in zip(names, lengths, strict=True)
    ]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None


def read_jsonl(path: Path) -> list[str]:
    """The prompts of a file with a JSON object per line; ValueError names a line that is not."""
    texts = []
    for number, line in enumerate(read_text(path).rstrip().split("\n"), start=1):
        try:
            texts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            texts.append(None)
        if not isinstance(texts[-1], str):
            raise ValueError(f'{path}, line {number}: not an object with a text "prompt"')
    return texts


def encode_prompt(
    text: str, args: argparse.Namespace, tokenizer: Tokenizer, chat: Chat | None
) -> list[int]:
    """Tokens of a prompt; a --prompt that is an integer N stands for N random tokens."""
    if not args.prompt or not text.isdecimal():
        if chat and text:
            return chat.start(text, args.system)
        return tokenizer.encode(text) if text else []
    n = int(text) if len(text) < 10 else 10**9
    if n > 10**7:
        raise ValueError(f"--prompt {text}: a synthetic prompt of so many tokens fits no model")
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(tokenizer.vocab_size, (n,), generator=generator).tolist()


def read_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer, chat: Chat | None, max_context: int
) -> list[list[int]]:
    """Token ids of every row of the batch; with --interactive, which has none yet, empty ones."""
    longest = max_context - args.max_new_tokens  # prompt tokens that leave room for the answer
    if longest < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} does not fit into the context of "
            f"{max_context} tokens"
        )
    if args.interactive:
        return [[]] * (args.batch_size or 1)
    if not (args.prompt or args.prompt_file or args.prompts):
        return demo_prompts(tokenizer, args.batch_size or DEMO_ROWS, min(DEMO_LONGEST, longest))
    texts = read_jsonl(args.prompts) if args.prompts else args.prompt
    texts = texts + [read_text(path) for path in args.prompt_file]
    prompts = [encode_prompt(text, args, tokenizer, chat) for text in texts]
    for number, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {number} is empty; nothing can follow from it")
        if len(ids) > longest:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens; the context of {max_context} "
                f"leaves room for {longest} with --max_new_tokens {args.max_new_tokens}"
            )
    n_rows = args.batch_size or len(prompts)
    if n_rows < len(prompts):
        raise ValueError(f"--batch_size {n_rows} is less than the {len(prompts)} prompts given")
    return [prompts[row % len(prompts)] for row in range(n_rows)]
