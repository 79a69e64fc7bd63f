"""All kinds of tokenizer: exact ids and round trips, specials as text, whole characters only.

The ids of tokenizer.json are held against those that the package `tokenizers` gave to the files of
tests/fixtures/tokenizers (scripts/make_tokenizer_fixtures.py), and against itself if installed.
"""

import base64
import json
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken

from checkpoint import DEMO_CHECKPOINT
from tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    NumberTokenizer,
    TextStream,
    continuation,
    load_tokenizer,
    read_ranks,
)

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
SHAPES = ("llama3", "qwen3", "gpt2")
KINDS = ("tiktoken", "llama2", "demo", *SHAPES)
EXPECTED = {name: json.loads((FIXTURES / name / "expected.json").read_text()) for name in SHAPES}
HARD = [case["text"] for case in EXPECTED["llama3"]]


@pytest.fixture(scope="module")
def tiktoken_dir(tmp_path_factory):
    """A tiktoken vocabulary: all bytes, and some merges in the order a trainer finds them."""
    path = tmp_path_factory.mktemp("tiktoken")
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b" t", b"he", b" the", b"in", b"re", b" a", b"\n\n", "é".encode(), b"123"]
    lines = [f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(tokens)]
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return path


def train_sentencepiece(path: Path, **options) -> Path:
    """Sentencepiece as Llama 2 has it: a dummy prefix space and byte fallback."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50),
        model_prefix=str(path / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def llama2_dir(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture
def directory(request, tiktoken_dir, llama2_dir):
    """A checkpoint directory by the name of its kind."""
    known = {"tiktoken": tiktoken_dir, "llama2": llama2_dir, "demo": DEMO_CHECKPOINT}
    return known.get(request.param, FIXTURES / request.param)


each_kind = pytest.mark.parametrize("directory", KINDS, indirect=True)


def in_qwen(directory: Path) -> bool:
    return directory.name == "qwen3"


@each_kind
def test_round_trip_and_bos(directory):
    tokenizer = load_tokenizer(directory)
    for text in HARD:
        ids = tokenizer.encode(text)
        if tokenizer.bos_id is not None:
            assert ids.pop(0) == tokenizer.bos_id
        assert tokenizer.bos_id not in ids
        assert max(ids, default=0) < tokenizer.vocab_size
        want = unicodedata.normalize("NFC", text) if in_qwen(directory) else text
        if "<think>\u0301" in text:  # normalised on its own, behind the added token
            want = text
        assert tokenizer.decode(ids) == want
        assert tokenizer.encode(text, bos=False) == ids


@pytest.mark.parametrize("name", SHAPES)
def test_ids_of_tokenizer_json_are_those_of_the_tokenizers_package(name):
    tokenizer = load_tokenizer(FIXTURES / name)
    assert len(EXPECTED[name]) == len(HARD) > 40
    for case in EXPECTED[name]:
        assert tokenizer.encode(case["text"], bos=False) == case["ids"]
        assert tokenizer.encode(case["text"], bos=False, specials=True) == case["special_ids"]


@pytest.mark.parametrize("name", SHAPES)
def test_ids_of_fresh_tokenizers_and_random_texts(name, tmp_path):
    theirs = pytest.importorskip("tokenizers")
    from scripts.make_tokenizer_fixtures import make, their_ids

    make(tmp_path, [name])
    tokenizer = load_tokenizer(tmp_path / name)
    reference = theirs.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
    rng = random.Random(name)
    for text in HARD + [random_text(rng) for _ in range(500)]:
        ids = their_ids(reference, text)
        assert tokenizer.encode(text, bos=False) == ids["ids"]
        assert tokenizer.encode(text, bos=False, specials=True) == ids["special_ids"]
        start = [tokenizer.bos_id] if name == "llama3" else []
        reference.encode_special_tokens = True
        assert reference.encode(text).ids == start + ids["ids"] == tokenizer.encode(text)


def random_text(rng: random.Random) -> str:
    """Parts of the hard texts, single characters of all planes, and control tokens, mixed."""
    parts = []
    for _ in range(rng.randint(1, 9)):
        text, at = rng.choice(HARD), rng.randint(0, 30)
        plane = rng.choice([(0, 0x250), (0x250, 0xD800), (0xE000, 0x110000)])
        parts.append(rng.choice([text[at : at + 9], chr(rng.randrange(*plane)), " ", "<|eot_id|>"]))
    return "".join(parts)


def test_ids_of_the_other_kinds_are_those_of_their_libraries(tiktoken_dir, llama2_dir):
    ranks = read_ranks(tiktoken_dir / "tokenizer.model")
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama2_dir / "tokenizer.model"))
    for text in HARD:
        ours = load_tokenizer(tiktoken_dir).encode(text, bos=False)
        assert ours == encoding.encode_ordinary(text)
        assert load_tokenizer(llama2_dir).encode(text, bos=False) == model.encode(text)


def test_tiktoken_specials_are_numbered_as_in_llama_3(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    assert tokenizer.bos_id == tokenizer.special("<|begin_of_text|>") == 265
    assert tokenizer.vocab_size == 265 + 256
    assert LLAMA3_SPECIALS.index("<|eot_id|>") == 9  # 128009 behind 128000 ranks
    assert tokenizer.encode(" the\n\n", bos=False) == [258, 262]
    assert tokenizer.encode("<|eot_id|> the", bos=False, specials=True) == [274, 258]
    assert tokenizer.decode([274]) == "<|eot_id|>"


def test_special_tokens_by_name(llama2_dir):
    llama3, qwen3 = (load_tokenizer(FIXTURES / name) for name in ("llama3", "qwen3"))
    assert llama3.special("<|eot_id|>") == 905 and llama3.special("<think>") is None
    assert qwen3.special("<think>") == 805 and qwen3.special("a") is None
    assert load_tokenizer(FIXTURES / "gpt2").special("<|endoftext|>") == 700
    llama2 = load_tokenizer(llama2_dir)
    assert [llama2.special(s) for s in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert [llama2.special(s) for s in ("the", "▁the", "<0x0A>", "[INST]")] == [None] * 4


def test_added_tokens_that_are_not_special_are_always_found():
    tokenizer = load_tokenizer(FIXTURES / "qwen3")
    think, end = tokenizer.special("<think>"), tokenizer.special("<|im_end|>")
    ids = tokenizer.encode("<think>a<|im_end|>")
    assert ids[0] == think and end not in ids
    assert tokenizer.encode("<think>a<|im_end|>", specials=True) == [think, ids[1], end]


def test_sentencepiece_named_pieces_and_added_tokens(tmp_path):
    train_sentencepiece(tmp_path, control_symbols=["[INST]"], user_defined_symbols=["<|im_end|>"])
    plain = load_tokenizer(tmp_path)
    n = plain.vocab_size
    assert plain.special("[INST]") == 3 and plain.special("<|im_end|>") == 4
    assert 3 not in plain.encode("[INST]") and 4 in plain.encode("a<|im_end|>")
    assert plain.encode("[INST]fox", specials=True) == [1, 3, *plain.encode("fox", bos=False)]
    config = {"add_bos_token": False, "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        str(n + 1): {"content": "<|x|>", "special": True},
        str(n): {"content": "<think>", "special": False},
    }}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.vocab_size == n + 2
    assert tokenizer.special("<|x|>") == n + 1 and tokenizer.special("<s>") == 1
    fox = tokenizer.encode("fox")
    assert tokenizer.encode("fox<think>fox") == [*fox, n, *fox]
    assert tokenizer.decode([1, *fox, n + 1, n, *fox, 99_999]) == "fox<|x|><think>fox"
    assert n + 1 not in tokenizer.encode("<|x|>")
    assert tokenizer.encode("<|x|>", specials=True) == [n + 1]


def test_special_tokens_that_sentencepiece_finds_by_itself_are_text(tmp_path):
    """Yi-chat's <|im_end|> is a user-defined piece, which sentencepiece finds in every text."""
    train_sentencepiece(tmp_path, user_defined_symbols=["<|im_end|>"])
    config = {"added_tokens_decoder": {"3": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("fox<|im_end|>", bos=False)
    assert 3 not in ids and tokenizer.decode(ids) == "fox<|im_end|>"
    assert tokenizer.encode("fox<|im_end|>", specials=True)[-1] == 3
    assert tokenizer.encode("fox", bos=False) == ids[: -len("<|im_end|>")]


@each_kind
def test_streamed_text_is_the_whole_text_in_whole_characters(directory):
    tokenizer = load_tokenizer(directory)
    for text in [*HARD, "".join(HARD)]:
        if in_qwen(directory):
            text = unicodedata.normalize("NFC", text)
        prompt = tokenizer.encode("the fox said ")
        new = tokenizer.encode(text, bos=False)
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.feed([token]) for token in new]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.close() == continuation(tokenizer, prompt, new)
        if directory.name.startswith("sentencepiece") and text:
            text = " " + text  # its encoding puts a space before every text
        assert continuation(tokenizer, prompt, new) == tokenizer.decode(prompt + new)[
            len(tokenizer.decode(prompt)) :
        ] == text or "<think>" in text  # fmt: skip


@each_kind
def test_streamed_random_ids_are_the_same_at_every_pace(directory):
    """Broken UTF-8, control tokens and ids of no token, in steps of all sizes."""
    tokenizer, rng = load_tokenizer(directory), random.Random(3)
    for step in (1, 2, 7, 40):
        ids = [rng.randrange(tokenizer.vocab_size + 9) for _ in range(400)]
        stream = TextStream(tokenizer, ids[:100])
        parts = [stream.feed(ids[i : i + step]) for i in range(100, 400, step)]
        assert "".join(parts) + stream.close() == continuation(tokenizer, ids[:100], ids[100:])


@each_kind
def test_a_stream_forgets_what_it_has_printed(directory):
    tokenizer = load_tokenizer(directory)
    stream = TextStream(tokenizer, [])
    for token in tokenizer.encode("the quick brown fox 漢字 " * 50):
        stream.feed([token])
        assert len(stream.ids) <= 40


@each_kind
def test_ids_of_padding_rows_decode_to_nothing(directory):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([*ids, 99_999]) == tokenizer.decode(ids)


@each_kind
@pytest.mark.parametrize("text, at", [("a\ud800b", 1), ("\udcff", 0), ("\ud83d\ude00", 0)])
def test_what_is_not_unicode_is_refused_with_its_place(directory, text, at):
    """Bytes that are not UTF-8 come from the command line like this; JSON can spell the others."""
    with pytest.raises(ValueError, match=rf"not UTF-8: its character {at} is '\\u"):
        load_tokenizer(directory).encode(text)


def test_a_directory_whose_name_is_not_utf8(llama2_dir, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.mkdir()
    (path / "tokenizer.model").write_bytes((llama2_dir / "tokenizer.model").read_bytes())
    assert load_tokenizer(path).encode("fox") == load_tokenizer(llama2_dir).encode("fox")


def test_random_weights_show_numbers():
    tokenizer = NumberTokenizer(100)
    assert continuation(tokenizer, [5, 99], [7, 8]) == " 7 8"
    with pytest.raises(ValueError, match="random weights have no tokenizer; give --prompt N"):
        tokenizer.encode("fox")


def test_a_prompt_cut_inside_a_character_is_completed_by_what_follows():
    tokenizer = load_tokenizer(FIXTURES / "gpt2")
    ids = tokenizer.encode("fox 👩")
    assert continuation(tokenizer, ids[:-1], ids[-1:]) == "👩"


def test_long_texts_are_fast():
    tokenizer = load_tokenizer(FIXTURES / "llama3")
    text = "".join(HARD) * 90
    begin = time.perf_counter()
    tokenizer.encode(text, specials=True)
    assert len(text) > 100_000 and time.perf_counter() - begin < 2


def test_the_order_of_files(tiktoken_dir, llama2_dir, tmp_path):
    """tokenizer.model, tokenizer.json, and where Hugging Face's Llama 3 directories keep Meta's."""
    (tmp_path / "original").mkdir()
    copies = {
        "original/tokenizer.model": (tiktoken_dir / "tokenizer.model", 265),
        "tokenizer.json": (FIXTURES / "llama3" / "tokenizer.json", 900),
        "tokenizer.model": (llama2_dir / "tokenizer.model", 1),
    }
    for name, (source, bos_id) in copies.items():
        (tmp_path / name).write_bytes(source.read_bytes())
        assert load_tokenizer(tmp_path).bos_id == bos_id


def test_missing_and_unknown_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model does not exist, nor tokenizer.js"):
        load_tokenizer(tmp_path)
    for content in (b"\x80\x02 neither of both", b"YQ== 0\n", b""):  # the second lacks most bytes
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="neither a sentencepiece model nor a tiktoken"):
            load_tokenizer(tmp_path)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TEMPLATE = {"type": "TemplateProcessing"}
START, TEXT = {"SpecialToken": {"id": "<|eot_id|>"}}, {"Sequence": {"id": "A"}}
REFUSALS = [  # field, value, what the message says
    ("model.type", "WordPiece", 'model.type is \'WordPiece\', supported is only "BPE"'),
    ("model.type", "Unigram", "of a sentencepiece model its tokenizer.model is needed"),
    ("model.byte_fallback", True, "model.byte_fallback is True.*its tokenizer.model is needed"),
    ("model.dropout", 0.1, "model.dropout is 0.1"),
    ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix is '##'"),
    ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix is '</w>'"),
    ("model.vocab", [], "model.vocab is .*of type dict"),
    ("model.vocab.a", "1", "model.vocab.a is '1'"),
    ("model.vocab.a", 1, "model.vocab.a is 1, supported is only an id of its own|an id of its own"),
    ("model.vocab.a", -1, "model.vocab.a is -1"),
    ("model.vocab.a", 10**12, "model.vocab.a is 1000000000000"),
    ("model.vocab. b", 5000, r"model.vocab. b is 5000, .* byte-level alphabet"),
    ("model.vocab.漢", 5000, r"model.vocab.\\u6f22 is 5000"),
    ("model.vocab.<|eot_id|>", 5000, "supported is only 905 as in added_tokens"),
    ("model.merges", None, "model.merges is None, supported is only of type list"),
    ("model.merges", ["a b c"], r"model.merges\[0\] is 'a b c', supported is only two tokens"),
    ("model.merges", [["a", 5]], r"model.merges\[0\] is"),
    ("model.merges", [["a", "\u1234"]], r"model.merges\[0\] is"),
    ("model.merges", [7], r"model.merges\[0\] is 7"),
    ("normalizer", {"type": "Prepend", "prepend": "▁"}, "normalizer.type is 'Prepend'.*is needed"),
    ("normalizer", {"type": "NFKC"}, "normalizer.type is 'NFKC', supported is only \"NFC\""),
    ("normalizer", "NFC", "normalizer is 'NFC', supported is only of type dict"),
    ("pre_tokenizer", None, "pre_tokenizer is None"),
    ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer.type is 'Metaspace'.*is needed"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space is True"),
    ("pre_tokenizer", BYTE_LEVEL, "pre_tokenizer.use_regex is False"),
    ("pre_tokenizer.pretokenizers", [], "Split and ByteLevel, or ByteLevel alone"),
    ("pre_tokenizer.pretokenizers.0", {"type": "Digits"},
     r"pre_tokenizer.pretokenizers\[0\].type is 'Digits', supported is only \"Split\""),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "behavior is 'Removed'"),
    ("pre_tokenizer.pretokenizers.0.invert", True, "invert is True"),
    ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "pattern.Regex is None"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", "(", "tiktoken cannot use this pattern"),
    ("pre_tokenizer.pretokenizers.1.use_regex", True, "use_regex is True"),
    ("post_processor", {"type": "RobertaProcessing"}, "post_processor.type is 'RobertaProcessing'"),
    ("post_processor", TEMPLATE, "post_processor.single is None"),
    ("post_processor", TEMPLATE | {"single": [TEXT, START]}, r"single\[1\].Sequence is None"),
    ("post_processor", TEMPLATE | {"single": [START, START, TEXT]}, "at most one token before it"),
    ("post_processor", TEMPLATE | {"single": [{"SpecialToken": {"id": "<x>"}}, TEXT]},
     "id is '<x>', supported is only one of added_tokens"),
    ("added_tokens", {}, "added_tokens is {}"),
    ("added_tokens.0.lstrip", True, r"added_tokens\[0\].lstrip is True"),
    ("added_tokens.0.rstrip", 1.5, r"added_tokens\[0\].rstrip is 1.5"),
    ("added_tokens.0.single_word", True, r"added_tokens\[0\].single_word is True"),
    ("added_tokens.0.content", "", r"added_tokens\[0\].content is ''"),
    ("added_tokens.0.content", "\ud800", r"added_tokens\[0\].content is '\\ud800'"),
    ("added_tokens.0.id", "7", r"added_tokens\[0\].id is '7', supported is only of type int"),
    ("added_tokens.0.id", True, r"added_tokens\[0\].id is True"),
    ("added_tokens.0.id", 901, "added_tokens gives an id to two tokens"),
    ("added_tokens.0.id", 5, "an id of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "words"), REFUSALS)
def test_refusals_name_file_and_field(field, value, words, tmp_path):
    file = json.loads((FIXTURES / "llama3" / "tokenizer.json").read_text())
    *path, last = field.split(".")
    part = file
    for key in path:
        part = part[int(key) if isinstance(part, list) else key]
    part[int(last) if isinstance(part, list) else last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=words) as e:
        load_tokenizer(tmp_path)
    assert str(e.value).startswith(str(tmp_path / "tokenizer.json")) and "\n" not in str(e.value)


def test_merges_out_of_order_are_refused_without_ignore_merges(tmp_path):
    """tiktoken joins by bytes; only where each merge is made of earlier ones it is the same."""
    file = json.loads((FIXTURES / "qwen3" / "tokenizer.json").read_text())
    file["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"merges\[\d+\] is .* made by earlier merges"):
        load_tokenizer(tmp_path)


def test_a_byte_that_is_missing_is_named(tmp_path):
    file = json.loads((FIXTURES / "gpt2" / "tokenizer.json").read_text())
    del file["model"]["vocab"]["Ċ"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="model.vocab lacks byte 0x0a"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 10**6, b"{}", b'{"model":1}']
)
def test_files_that_are_no_tokenizer_json(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tokenizer.json(: | is not valid JSON| does not hold a JSON obj)"
    ):
        load_tokenizer(tmp_path)


def test_any_field_of_any_other_type_is_a_one_line_error(tmp_path):
    """Whatever a part of the file is replaced by: it loads, or a ValueError names the file."""
    original = (FIXTURES / "llama3" / "tokenizer.json").read_text()
    rng = random.Random(5)
    for _ in range(300):
        file = json.loads(original)
        file["model"]["merges"] = file["model"]["merges"][:5]
        part, key = file, rng.choice(sorted(file))
        while isinstance(part[key], dict | list) and part[key] and rng.random() < 0.7:
            part = part[key]
            key = rng.randrange(len(part)) if isinstance(part, list) else rng.choice(sorted(part))
        part[key] = rng.choice([None, True, -1, 1.5, "", "x", [], [1], [[]], {}, {"type": "BPE"}])
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        try:
            assert load_tokenizer(tmp_path).encode("fox\n")
        except ValueError as e:
            assert str(e).startswith(str(tmp_path)) and "\n" not in str(e)


def test_a_value_of_any_depth_is_shown_in_short(tmp_path):
    """Python shows a list only if it is not nested as deeply as it can read one."""
    for depth in (50, 900, 960, 990):
        value = "[" * depth + "]" * depth
        (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"type": {value}}}}}')
        with pytest.raises(
            ValueError, match=r"tokenizer.json(: model.type is \[\[| is not valid JSON)"
        ) as e:
            load_tokenizer(tmp_path)
        assert len(str(e.value)) < 300


def test_text_that_a_pattern_leaves_out_is_kept(tmp_path):
    file = json.loads((FIXTURES / "llama3" / "tokenizer.json").read_text())
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(tmp_path)
    assert all(tokenizer.decode(tokenizer.encode(text, bos=False)) == text for text in HARD)


def test_a_text_that_needs_too_many_steps():
    """A million blanks are more than the regular expressions of tiktoken can take back."""
    with pytest.raises(ValueError, match="too many steps"):
        load_tokenizer(FIXTURES / "llama3").encode("a" + " " * 1_100_000)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, ": added_tokens_decoder.x is"),
        ({"added_tokens_decoder": {"5": {"content": 1}}}, ": added_tokens_decoder.5.content is 1"),
        ({"added_tokens_decoder": []}, r": added_tokens_decoder is \[\]"),
        ([], " does not hold a JSON object"),
    ],
)
def test_refusals_of_tokenizer_config(config, words, llama2_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama2_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer_config.json" + words):
        load_tokenizer(tmp_path)
