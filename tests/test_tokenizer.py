"""Both kinds of tokenizer.model: exact round trips, specials as text, whole characters only."""

import base64

import pytest
import sentencepiece

from generate import DEMO_CHECKPOINT
from tokenizer import LLAMA3_SPECIALS, TextStream, continuation, load_tokenizer

HARD = [
    "def f(x):\n\treturn  x  \n\n\n",
    "naïve café, Ελληνικά, русский, עברית, हिन्दी, 漢字かな, 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0|",
    "1234567890 0.5e-10 0x7f", " leading and trailing  ", "\x00\x01\x7f\r\n",
    "<s></s><|begin_of_text|><|eot_id|> are text here", "a" * 300, "'s 'LL don't",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiktoken_dir(tmp_path_factory):
    """A tiktoken vocabulary: all bytes, and some merges in the order a trainer finds them."""
    path = tmp_path_factory.mktemp("tiktoken")
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b" t", b"he", b" the", b"in", b"re", b" a", b"\n\n", "é".encode(), b"123"]
    lines = [f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(tokens)]
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def llama2_dir(tmp_path_factory):
    """Sentencepiece as Llama 2 has it: a dummy prefix space and byte fallback."""
    path = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50),
        model_prefix=str(path / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["tiktoken_dir", "llama2_dir", "demo"])
def test_round_trip_and_bos(kind, request):
    path = DEMO_CHECKPOINT if kind == "demo" else request.getfixturevalue(kind)
    tokenizer = load_tokenizer(path)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.encode(text, bos=False) == ids[1:]


def test_tiktoken_specials_are_numbered_as_in_llama_3(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    assert tokenizer.bos_id == 265
    assert tokenizer.vocab_size == 265 + 256
    assert LLAMA3_SPECIALS.index("<|eot_id|>") == 9  # 128009 behind 128000 ranks
    assert tokenizer.encode(" the\n\n", bos=False) == [258, 262]


@pytest.mark.parametrize("kind", ["tiktoken_dir", "llama2_dir", "demo"])
def test_streamed_text_is_the_whole_text_in_whole_characters(kind, request):
    path = DEMO_CHECKPOINT if kind == "demo" else request.getfixturevalue(kind)
    tokenizer = load_tokenizer(path)
    for text in HARD:
        prompt = tokenizer.encode("the fox said ")
        new = tokenizer.encode(text, bos=False)
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.feed([token]) for token in new]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.close() == continuation(tokenizer, prompt, new)
        if kind != "llama2_dir":  # whose encoding puts a space before every text
            assert continuation(tokenizer, prompt, new) == text


def test_ids_of_padding_rows_decode_to_nothing(tiktoken_dir, llama2_dir):
    for path in (tiktoken_dir, llama2_dir):
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("fox")
        assert tokenizer.decode([*ids, 99_999]) == tokenizer.decode(ids)


def test_llama_3_directories_keep_it_in_original(tiktoken_dir, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(
        (tiktoken_dir / "tokenizer.model").read_bytes()
    )
    assert load_tokenizer(tmp_path).bos_id == 265


def test_missing_and_unknown_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model does not exist"):
        load_tokenizer(tmp_path)
    for content in (b"\x80\x02 neither of both", b"YQ== 0\n"):  # the second lacks most bytes
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="neither a sentencepiece model nor a tiktoken"):
            load_tokenizer(tmp_path)
