"""Text to token ids and back, from the files that model directories hold.

Three kinds of file, told by content:

* sentencepiece `tokenizer.model` (binary protobuf): Llama 2, TinyLlama, Mistral, Yi, the demo;
* tiktoken `tokenizer.model` (lines of base64 and rank): Llama 3 as Meta ships it;
* Hugging Face `tokenizer.json` of the byte-level BPE kind: Llama 3, Qwen2, Qwen3, GPT-2.

The last two work alike, and tiktoken does both. Meta's file lacks the pattern and the special
tokens, which stand below. A pattern cuts the text into pieces. In a piece, starting from bytes,
the pair whose joined token is the oldest is joined first:

    "low lower" -> "low", " lower" -> l o w, _ l o w e r -> low, _low er

tiktoken joins by the joined bytes, tokenizer.json by its list of pairs ("merges"). Both are the
same where each merge is made of earlier ones, as trainers write them, and where every pair of a
token is listed, as for Llama 3 (`ignore_merges`). A token's first merge is its rank for tiktoken,
and ids may have any order. All that would change ids unnoticed is refused, by file and field.

Text is always text: "<|eot_id|>" in a prompt is encoded as its characters, unless `specials` asks
for the token. Added tokens that are not special (Qwen3's "<think>") are always matched.
"""

import base64
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import tiktoken

from config import Json, open_json

# From the Llama 3 release, github.com/meta-llama/llama3, llama/tokenizer.py
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ByteLevel's own; from the GPT-2 release, github.com/openai/gpt-2, src/encoder.py
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)  # fmt: skip
CONTEXT = 8  # tokens that TextStream keeps, so that the next ones are decoded as they follow
HINT = "; of a sentencepiece model its tokenizer.model is needed"  # not its tokenizer.json
KINDS = "supported: sentencepiece, tiktoken (Llama 3), byte-level tokenizer.json (Llama 3, Qwen)"


def tokenizer_config(checkpoint_dir: Path) -> Json:
    """The directory's tokenizer_config.json; without one, an empty object."""
    path = checkpoint_dir / "tokenizer_config.json"
    return open_json(path) if path.is_file() else Json(path, "", {})


@dataclass(frozen=True, slots=True)
class Added:
    """A token that is looked for in the text before anything else happens to it."""

    id: int
    special: bool  # a control token: is text unless the caller wants specials
    normalized: bool  # looked for after the normaliser, not before it
    rstrip: bool = False  # blanks behind it are part of it


class Tokenizer(ABC):
    """Text to token ids and back. A kind of file adds `encode_text` and `decode`."""

    bos_id: int | None  # put before every text; None where the model has none
    vocab_size: int  # the largest id + 1
    added: dict[str, Added]

    def encode(self, text: str, bos: bool = True, specials: bool = False) -> list[int]:
        """Ids of the text. With `specials`, "<|eot_id|>" in it is that token, not its characters.

        Raises ValueError for half a surrogate pair: JSON can spell it, a byte be read as one.
        """
        bad = surrogate(text)
        if bad is not None:
            raise ValueError(f"the text is not UTF-8: its character {bad} is {text[bad]!a}")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for part in self.split(text, specials, normalized=False):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in self.split(self.normalize(part), specials, normalized=True):
                ids += [piece] if isinstance(piece, int) else self.encode_text(piece)
        return ids

    def split(self, text: str, specials: bool, normalized: bool) -> list[str | int]:
        """Text and ids of added tokens in turn, text first and last."""
        tokens = {}
        for token, added in self.added.items():
            if added.normalized == normalized and (specials or not added.special):
                token = self.normalize(token) if normalized else token
                tokens[token] = added.id
                if added.rstrip:
                    text = re.sub(rf"(?<={re.escape(token)})\s+", "", text)
        return [tokens[part] if n % 2 else part for n, part in enumerate(split_at(tokens, text))]

    def normalize(self, text: str) -> str:
        """The text as the model knows it, where other spellings mean the same."""
        return text

    def special(self, text: str) -> int | None:
        """The id of a control or added token by its text. None if there is none."""
        return self.added[text].id if text in self.added else None

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which no added token is looked for."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text. Ids outside the vocabulary (padding rows of the model) decode to nothing."""


def split_at(marks: Collection[str], text: str) -> list[str]:
    """Text and marks in turn, text first and last. Of two marks at one place the longer counts."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if marks else [text]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, and what tokenizer_config.json adds. RuntimeError if it is none."""

    def __init__(self, path: Path, config: Json) -> None:
        self.model = model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())  # it opens no path that is not UTF-8
        bos = model.bos_id() >= 0 and config["add_bos_token"].value is not False
        self.bos_id = model.bos_id() if bos else None
        control = [i for i in range(model.vocab_size()) if model.is_control(i)]
        self.added = {model.id_to_piece(i): Added(i, True, False) for i in control}
        listed = config["added_tokens_decoder"]
        for number in listed.of(dict) if listed.value is not None else ():
            if not re.fullmatch("[0-9]{1,9}", number):
                raise listed[number].refused("under the id of the token")
            text, added = read_added(listed[number], int(number))
            self.added[text] = replace(added, normalized=False)
        n = model.vocab_size()
        self.more = {token.id: text for text, token in self.added.items() if token.id >= n}
        self.vocab_size = max([n, *(i + 1 for i in self.more)])
        self.hidden = [t for t, a in self.added.items() if a.special and a.id in model.encode(t)]

    def encode_text(self, text: str) -> list[int]:
        """Special tokens that sentencepiece finds by itself are spelled out: text is text."""
        ids: list[int] = []
        for n, part in enumerate(split_at(self.hidden, text)):
            ids += self.spell(part) if n % 2 else self.model.encode(part)
        return ids

    def spell(self, text: str) -> list[int]:
        """Ids of single characters, or of their bytes where the model has no such character."""
        ids: list[int] = []
        for char in text:
            i = self.model.piece_to_id(char)
            by_bytes = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
            ids += by_bytes if self.model.is_unknown(i) else [i]
        return ids

    def special(self, text: str) -> int | None:
        """User-defined pieces count too: sentencepiece itself looks for them in texts."""
        i = self.model.piece_to_id(text)
        score = str(self.model.get_score(i))  # theirs is 0.0; the first merge's is -0.0
        defined = score == "0.0" and self.model.id_to_piece(i) == text
        known = super().special(text)
        return i if known is None and defined and not self.model.is_byte(i) else known

    def decode(self, ids: list[int]) -> str:
        """Control tokens decode to nothing too, as in sentencepiece."""
        text = ""
        run: list[int] = []
        for i in ids:
            if i in self.more:
                text, run = text + self.model.decode(run) + self.more[i], []
            elif i < self.model.vocab_size():
                run.append(i)
        return text + self.model.decode(run)


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken. Raises ValueError if the pattern is no regular expression."""

    def __init__(
        self,
        ranks: dict[bytes, int],  # token bytes -> merge priority 0, 1, ...; with every single byte
        ids: list[int],  # priority -> id
        pattern: str,
        added: dict[str, Added],
        bos_id: int | None,
        nfc: bool = False,
    ) -> None:
        # tiktoken drops what a pattern leaves out; `tokenizers` keeps it as a piece, and so do we.
        whole = f"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+"
        self.model = tiktoken.Encoding("", pat_str=whole, mergeable_ranks=ranks, special_tokens={})
        self.ids, self.added, self.bos_id, self.nfc = ids, added, bos_id, nfc
        self.tokens = {ids[rank]: token for token, rank in ranks.items()}
        self.tokens |= {token.id: text.encode() for text, token in added.items()}
        self.vocab_size = max(self.tokens) + 1

    def normalize(self, text: str) -> str:
        """Composed characters (Unicode's NFC), if the file asks for it."""
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode_text(self, text: str) -> list[int]:
        """Raises ValueError where the pattern's search is given up: a million blanks do it."""
        try:
            return [self.ids[rank] for rank in self.model.encode_ordinary(text)]
        except BaseException as e:  # what a panic of tiktoken is derived from
            if type(e).__name__ != "PanicException":
                raise
        raise ValueError("the tokenizer's pattern needs too many steps on this text")

    def decode(self, ids: list[int]) -> str:
        """Special tokens decode to their names, broken UTF-8 to U+FFFD."""
        return b"".join(self.tokens.get(i, b"") for i in ids).decode(errors="replace")


class NumberTokenizer(Tokenizer):
    """For random weights, which know no language: ids are shown as numbers."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.bos_id, self.added = vocab_size, None, {}

    def encode_text(self, text: str) -> list[int]:
        """Raises ValueError: there is nothing to encode with."""
        raise ValueError("random weights have no tokenizer; give --prompt N for N random tokens")

    def decode(self, ids: list[int]) -> str:
        """The numbers themselves."""
        return "".join(f" {i}" for i in ids)


def read_tiktoken(path: Path) -> BytePairTokenizer:
    """Llama 3's `tokenizer.model`: ranks, then 256 special tokens. ValueError as in read_ranks."""
    ranks = read_ranks(path)
    first = len(ranks)
    added = {token: Added(first + i, True, False) for i, token in enumerate(LLAMA3_SPECIALS)}
    return BytePairTokenizer(ranks, list(range(first)), LLAMA3_PATTERN, added, bos_id=first)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file. Raises ValueError if it is none."""
    pairs = (line.split() for line in path.read_bytes().split(b"\n") if line.strip())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    numbered = sorted(ranks.values()) == list(range(len(ranks)))
    if not numbered or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{path} does not number every byte and more tokens, from 0 on")
    return ranks


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """A byte-level BPE `tokenizer.json`. Raises ValueError, with file and field, for all others."""
    file = open_json(path)
    pattern, normalizer = read_pattern(file), file["normalizer"]
    if normalizer.value is not None:
        normalizer["type"].only("NFC", hint=HINT)
    listed = file["added_tokens"]
    tokens = [read_added(t, t["id"].of(int)) for t in listed] if listed.value is not None else []
    added = dict(tokens)
    vocab = read_vocabulary(file["model"]["vocab"], added)
    order = read_merges(file["model"], vocab)
    bytes_of = {ord(letter): byte for byte, letter in enumerate(byte_letters())}
    ranks = {token.translate(bytes_of).encode("latin-1"): n for token, n in order.items()}
    ids = [vocab[token] for token in order]
    bos_id = read_bos(file["post_processor"], added)
    try:
        return BytePairTokenizer(ranks, ids, pattern, added, bos_id, normalizer.value is not None)
    except ValueError as e:
        raise ValueError(f"{path}: pre_tokenizer: tiktoken cannot use this pattern: {e}") from None


def read_pattern(file: Json) -> str:
    """The pattern that cuts a text into pieces. ValueError for what would cut it in another way."""
    model, pre = file["model"], file["pre_tokenizer"]
    model["type"].only("BPE", None, hint=HINT)
    model["byte_fallback"].only(False, None, hint=HINT)
    model["dropout"].only(None, 0)
    model["continuing_subword_prefix"].only(None, "")
    model["end_of_word_suffix"].only(None, "")
    steps = list(pre["pretokenizers"]) if pre["type"].value == "Sequence" else [pre]
    if len(steps) not in (1, 2):
        raise pre.refused("Split and ByteLevel, or ByteLevel alone")
    *split, byte_level = steps
    byte_level["type"].only("ByteLevel", hint=HINT)
    byte_level["add_prefix_space"].only(False)
    byte_level["use_regex"].only(*((False,) if split else (True, None)))
    if not split:
        return GPT2_PATTERN
    split[0]["type"].only("Split")
    split[0]["behavior"].only("Isolated")
    split[0]["invert"].only(False, None)
    return split[0]["pattern"]["Regex"].of(str)


def read_added(token: Json, i: int) -> tuple[str, Added]:
    """Text and properties of an added token. Raises ValueError for those we do not have."""
    for field in ("single_word", "lstrip"):
        token[field].only(False, None)
    token["rstrip"].only(False, True, None)
    text = token["content"].of(str)
    if not text or surrogate(text) is not None:
        raise token["content"].refused("text")
    if not 0 <= i < 2**31:
        raise token["id"].refused("a number from 0 to 2147483647")
    return text, Added(i, *(token[k].value is True for k in ("special", "normalized", "rstrip")))


def surrogate(text: str) -> int | None:
    """The place of the first half of a surrogate pair, which no encoding of Unicode has."""
    return half.start() if (half := re.search("[\ud800-\udfff]", text)) else None


def byte_letters() -> list[str]:
    """GPT-2's letters for the bytes 0 to 255: itself if it prints, chr(256 + n) the n-th other."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printing]
    return [chr(256 + hidden.index(b) if b in hidden else b) for b in range(256)]


def read_vocabulary(vocab: Json, added: dict[str, Added]) -> dict[str, int]:
    """Token in byte letters -> id. Raises ValueError if an id stands for two tokens."""
    taken = {token.id: text for text, token in added.items()}
    if len(taken) != len(added):
        raise ValueError(f"{vocab.path}: added_tokens gives an id to two tokens")
    letters = set(byte_letters())
    for text, i in vocab.of(dict).items():
        if type(i) is not int or not 0 <= i < 2**31 or taken.setdefault(i, text) != text:
            raise vocab[text].refused("an id of its own")
        if text in added and added[text].id != i:
            raise vocab[text].refused(f"{added[text].id} as in added_tokens")
        if text not in added and not letters.issuperset(text):
            raise vocab[text].refused("a token in the byte-level alphabet")
    missing = [byte for byte, letter in enumerate(byte_letters()) if letter not in vocab.value]
    if missing:
        raise ValueError(f"{vocab.path}: {vocab.name} lacks byte {missing[0]:#04x}; all are needed")
    return {text: i for text, i in vocab.value.items() if letters.issuperset(text)}


def read_merges(model: Json, vocab: dict[str, int]) -> dict[str, int]:
    """Token in byte letters -> priority: bytes first, others by their first merge.

    Raises ValueError for a merge of what is no token yet.
    """
    whole = model["ignore_merges"].value is True  # a piece that is a token needs no merges
    ranks = {letter: byte for byte, letter in enumerate(byte_letters())}
    parts = vocab if whole else ranks
    for n, merge in enumerate(model["merges"].of(list)):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(a), str(b)] if a in parts and b in parts and a + b in vocab:
                ranks.setdefault(a + b, len(ranks))
            case _:
                where = "the vocabulary" if whole else "the vocabulary, made by earlier merges,"
                raise model["merges"][n].refused(f"two tokens of {where} that join to a third")
    for token in vocab if whole else ():
        ranks.setdefault(token, len(ranks))
    return ranks


def read_bos(post: Json, added: dict[str, Added]) -> int | None:
    """The id that the post-processor puts before a text. Raises ValueError if it does more."""
    if post.value is None:
        return None
    for step in post["processors"] if post["type"].value == "Sequence" else (post,):
        step["type"].only("ByteLevel", "TemplateProcessing")
        if step["type"].value == "TemplateProcessing":
            single = list(step["single"])
            if len(single) not in (1, 2):
                raise step["single"].refused("the text with at most one token before it")
            single[-1]["Sequence"]["id"].only("A")
            if len(single) == 2:
                name = single[0]["SpecialToken"]["id"]
                if name.of(str) not in added:
                    raise name.refused("one of added_tokens")
                step["special_tokens"][name.value]["ids"].only([added[name.value].id])
                return added[name.value].id
    return None


def load_tokenizer(checkpoint_dir: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises FileNotFoundError if it has none of the files, ValueError if the file is of no kind.
    """
    config = tokenizer_config(checkpoint_dir)
    names = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")
    paths = [checkpoint_dir / name for name in names if (checkpoint_dir / name).is_file()]
    if not paths:
        missing = f"{checkpoint_dir / names[0]} does not exist, nor {names[1]} or {names[2]}"
        raise FileNotFoundError(f"{missing}; {KINDS}")
    if paths[0].suffix == ".json":
        return read_tokenizer_json(paths[0])
    with suppress(ValueError):
        return read_tiktoken(paths[0])
    with suppress(RuntimeError):
        return SentencePieceTokenizer(paths[0], config)
    raise ValueError(f"{paths[0]} is neither a sentencepiece model nor a tiktoken file; {KINDS}")


class TextStream:
    """Turns tokens that keep coming into text, never giving out half a character.

    A token's text may depend on its neighbours. So the newest are decoded together.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = prompt[-CONTEXT:]  # sentencepiece drops a space at the very start
        self.shown = len(whole_characters(tokenizer.decode(self.ids)))

    def feed(self, new_ids: list[int]) -> str:
        """The text that these tokens complete. An unfinished character waits for the next call."""
        self.ids = self.ids + new_ids
        decoded = self.tokenizer.decode(self.ids)
        text = whole_characters(decoded)
        fresh, self.shown = text[self.shown :], max(self.shown, len(text))
        if len(self.ids) > 4 * CONTEXT and text == decoded:
            self.forget()
        return fresh

    def forget(self) -> None:
        """Keep the newest tokens only, where their text ends with a whole character."""
        text = self.tokenizer.decode(self.ids[-CONTEXT:])
        if text and text == whole_characters(text):
            self.ids, self.shown = self.ids[-CONTEXT:], len(text)

    def close(self) -> str:
        """What is left, unfinished characters included."""
        return self.tokenizer.decode(self.ids)[self.shown :]


def whole_characters(text: str) -> str:
    """The text without what may be the beginning of a character: at most three broken bytes."""
    return text[: max(len(text) - 3, len(text.rstrip("\ufffd")))]


def continuation(tokenizer: Tokenizer, prompt: list[int], new_ids: list[int]) -> str:
    """Text of new tokens as they follow the prompt."""
    stream = TextStream(tokenizer, prompt)
    return stream.feed(new_ids) + stream.close()
