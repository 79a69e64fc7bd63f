"""Small tokenizers in the exact shapes of real ones, and the ids that `tokenizers` gives them.

    python scripts/make_tokenizer_fixtures.py            # writes tests/fixtures/tokenizers/

Needs the package `tokenizers`, which the project itself does without: tests/test_tokenizer.py holds
tokenizer.py against the files that this script wrote, and where `tokenizers` is installed against
files that it writes anew. Trained on sources of the standard library and the texts below.

Each directory gets tokenizer.json, tokenizer_config.json and expected.json, a list of
{"text", "ids": every special token as text, "special_ids": special tokens as such}, no BOS.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tokenizer import LLAMA3_PATTERN

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "tokenizers"
MODULES = ("argparse", "ast", "calendar", "csv", "json", "textwrap", "typing", "zipfile")
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
MULTILINGUAL = (
    "Der Zug fährt über die Brücke, und die Straße ist naß. Où est la forêt près du café ?",
    "El niño pequeño comió una piña. Žluťoučký kůň úpěl ďábelské ódy. Łódź, żółw.",
    "Η γρήγορη αλεπού πηδάει πάνω από τον σκύλο. Быстрая лиса прыгает через собаку.",
    "השועל המהיר קופץ מעל הכלב. الثعلب السريع يقفز فوق الكلب.",
    "तेज़ लोमड़ी कुत्ते के ऊपर से कूदती है। จิ้งจอกกระโดดข้ามสุนัข",
    "敏捷的狐狸跳过了懒狗。今日は良い天気ですね。빠른 여우가 개를 뛰어넘는다.",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇩🇪 and 1234567890 or 3.14159, 0xFF",
)
HARD = (
    "def f(x):\n\treturn  x  \n\n\n", "    if a[i] != b[j]:\r\n        raise ValueError('no')\r\n",
    "naïve café, Ελληνικά, русский, עברית, हिन्दी, 漢字かな, 한국어, ไทย, العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪❤️ x", "NFC é ñ Å ộ 각",
    "NFD e\u0301 n\u0303 A\u030a o\u0323\u0302 \u1100\u1161\u11a8",
    "\u0301 starts with a mark, \u212b and \u2126 and \uf900 change", "ﬁ ½ ① Ⅷ ² keep",
    "\x00\x01\x02\x1b[31m\x7f\x80\x85\x9f", "\u200b\u200e\u2028\u2029\ufeff\ufffd\ufffe\U0010ffff",
    "a\x0bb\x0cc\x1cd\x1fe\u00a0f\u1680g\u180eh\u3000i", "1234567890" * 5,
    "12 123 1234 ١٢٣٤ 万一 1e-10",
    " leading", "trailing   ", "   ", "\n", "\n\n \n  \n",
    "\t\t x\t ", "a  b   c    d", "a \n b\r\n\rc",
    "don't DON'T I'll we'LL 'S 've he'd'd", "'", "''s", "a" * 300, "=" * 80, "(((((", "?!?!\n\n?!",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|> b<|endoftext|>",
    "<think>\nhm\n</think>\n\n", "<think><think> </think >x<tool_call>{}</tool_call>", "<|im_start",
    "e<think>\u0301", "https://example.org/a_b?c=d&e=%20f#g", "snake_case CamelCase kebab-case",
    "日本語 mixed with English, и русским.", "\u0e01\u0e33\u0e49", "I\u0307 \u0130 ı ß ẞ ſ", "",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells one family's tokenizer.json from another's."""

    vocab_size: int  # trained tokens
    pattern: str | None  # None: ByteLevel cuts, as in GPT-2
    nfc: bool = False
    specials: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # not special: always found in the text
    bos: str | None = None
    eos: str = "<|endoftext|>"
    ignore_merges: bool = False
    every_merge: bool = False  # all pairs of a token, as files made from tiktoken's list them
    merge_strings: bool = False  # "a b", not ["a", "b"]
    in_vocab: bool = False  # special tokens stand in the vocabulary too
    normalized: bool = False  # special tokens are looked for behind the normaliser


SHAPES = {
    "llama3": Shape(
        900, LLAMA3_PATTERN, bos="<|begin_of_text|>", eos="<|eot_id|>",
        ignore_merges=True, every_merge=True, merge_strings=True,
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    ),
    "qwen3": Shape(
        800, QWEN_PATTERN, nfc=True, eos="<|im_end|>",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "gpt2": Shape(700, None, specials=("<|endoftext|>",), merge_strings=True, in_vocab=True,
                  normalized=True),
}  # fmt: skip


def corpus() -> Iterator[str]:
    for name in MODULES:
        yield from inspect.getsource(importlib.import_module(name)).splitlines(keepends=True)
    for text in MULTILINGUAL:
        yield from [text] * 20


def train(shape: Shape) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if shape.pattern:
        split = pre_tokenizers.Split(Regex(shape.pattern), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    tokenizer.normalizer = normalizers.NFC() if shape.nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def every_pair(vocab: dict[str, int]) -> list[list[str]]:
    """All pairs of tokens that join to a token, as transformers lists a tiktoken vocabulary's."""
    pairs = []
    for token in sorted(vocab, key=vocab.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        pairs += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return [list(pair) for pair in pairs]


def tokenizer_json(shape: Shape) -> dict:
    """The file's content: the trained tokenizer, and what the family adds to it."""
    file = json.loads(train(shape).to_str())
    model = file["model"]
    vocab, merges = model["vocab"], model["merges"]
    if shape.every_merge:
        merges = every_pair(vocab)
    model["merges"] = [" ".join(pair) for pair in merges] if shape.merge_strings else merges
    model["ignore_merges"] = shape.ignore_merges
    ids = {text: len(vocab) + i for i, text in enumerate(shape.specials + shape.added)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": shape.normalized}
    file["added_tokens"] = [
        {"id": i, "content": text, **flags, "special": text in shape.specials}
        for text, i in ids.items()
    ]
    if shape.in_vocab:
        vocab |= ids
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}  # fmt: skip
    file["post_processor"] = byte_level
    if shape.bos:
        start = {"SpecialToken": {"id": shape.bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        bos = {"id": shape.bos, "ids": [ids[shape.bos]], "tokens": [shape.bos]}
        template = {"type": "TemplateProcessing", "single": [start, a],
                    "pair": [start, a, start, b],
                    "special_tokens": {shape.bos: bos}}  # fmt: skip
        file["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    return file


def expected(path: Path) -> list[dict]:
    """What `tokenizers` makes of the hard texts."""
    return [{"text": text} | their_ids(Tokenizer.from_file(str(path)), text) for text in HARD]


def their_ids(tokenizer: Tokenizer, text: str) -> dict[str, list[int]]:
    """Ids without BOS: with special tokens in the text as text, and as tokens."""
    ids = {}
    for key, as_text in (("ids", True), ("special_ids", False)):
        tokenizer.encode_special_tokens = as_text
        ids[key] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def write(value: object, path: Path) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text.replace('},{"text"', '},\n{"text"') + "\n", encoding="utf-8")


def make(out: Path, names: Iterable[str] = SHAPES) -> None:
    """Write the fixture directories of these names."""
    for name in names:
        shape = SHAPES[name]
        path = out / name
        path.mkdir(parents=True, exist_ok=True)
        write(tokenizer_json(shape), path / "tokenizer.json")
        config = {"bos_token": shape.bos, "eos_token": shape.eos}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        write(config, path / "tokenizer_config.json")
        write(expected(path / "tokenizer.json"), path / "expected.json")


if __name__ == "__main__":
    make(FIXTURES)
