"""Text to token ids and back, for the two kinds of `tokenizer.model` that Llama directories hold.

Llama 2, TinyLlama, Mistral and this project's demo ship a sentencepiece model (binary protobuf).
Llama 3 ships a tiktoken vocabulary (one base64 token and its rank per line) of the same name, in
`original/`; its pre-tokenisation pattern and special tokens are not in the file and are written
down here. The kind is told by content, not by guessing from names.

Both kinds are behind one small interface: `encode`, `decode`, `bos_id`, `vocab_size`. Text is
always text: "<|eot_id|>" in a prompt is encoded as its characters, not as the special token.
"""

import base64
from pathlib import Path
from typing import Protocol

import sentencepiece
import tiktoken

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # from the Llama 3 release, github.com/meta-llama/llama3, llama/tokenizer.py
LLAMA3_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)  # fmt: skip


class Tokenizer(Protocol):
    bos_id: int | None  # put before every text; None where the model has none
    vocab_size: int

    def encode(self, text: str, bos: bool = True) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer:
    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids outside the vocabulary (padding rows of the model) decode to nothing."""
        return self.model.decode([i for i in ids if i < self.vocab_size])


class TiktokenTokenizer:
    """Llama 3's vocabulary: mergeable ranks from the file, 256 special tokens after them."""

    def __init__(self, path: Path) -> None:
        ranks = read_ranks(path)
        specials = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIALS)}
        self.model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.bos_id = specials["<|begin_of_text|>"]
        self.vocab_size = len(ranks) + len(specials)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + self.model.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.vocab_size])


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file. Raises ValueError if a line is not "base64 rank"."""
    lines = path.read_bytes().split(b"\n")
    pairs = [line.split() for line in lines if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{path} does not hold every single byte")
    return ranks


def load_tokenizer(checkpoint_dir: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises FileNotFoundError if there is no `tokenizer.model`, ValueError if it is of neither kind.
    """
    path = checkpoint_dir / "tokenizer.model"
    if not path.is_file():  # where Hugging Face's Llama 3 directories keep it
        path = checkpoint_dir / "original" / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint_dir / 'tokenizer.model'} does not exist, nor original/tokenizer.model; "
            f"supported are the sentencepiece (Llama 2) and tiktoken (Llama 3) kinds"
        )
    for kind in (TiktokenTokenizer, SentencePieceTokenizer):
        try:
            return kind(path)
        except (ValueError, RuntimeError):
            continue
    raise ValueError(f"{path} is neither a sentencepiece model nor a tiktoken vocabulary")


class TextStream:
    """Turns a growing list of tokens into text, never giving out half a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = prompt[-8:]  # some context: sentencepiece drops a space at the very start
        self.shown = len(tokenizer.decode(self.ids))

    def feed(self, new_ids: list[int]) -> str:
        """The text that these tokens complete; an unfinished character waits for the next call."""
        self.ids = self.ids + new_ids
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        fresh = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return fresh

    def close(self) -> str:
        """What is left, unfinished characters included."""
        return self.tokenizer.decode(self.ids)[self.shown :]


def continuation(tokenizer: Tokenizer, prompt: list[int], new_ids: list[int]) -> str:
    """Text of new tokens as they follow the prompt."""
    stream = TextStream(tokenizer, prompt)
    return stream.feed(new_ids) + stream.close()
