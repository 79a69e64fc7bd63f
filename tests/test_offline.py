"""Files of prompts: what a line means, all that it may not be, and where an answer ends."""

import json
import random
from pathlib import Path

import pytest

from chat import load_chat
from checkpoint import Checkpoint
from config import ModelConfig
from offline import BadLines, Defaults, StopTexts, answer_text, read_input
from sampling import Sampling, row_seed
from tokenizer import continuation, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
TOKENIZER = load_tokenizer(FIXTURES / "qwen3")
CONFIG = ModelConfig(32, 2, 4, 2, 8, 48, TOKENIZER.vocab_size, 500)
PLAIN = Checkpoint(FIXTURES / "qwen3", CONFIG, TOKENIZER, None)
DEFAULTS = Defaults(max_new_tokens=10, sampling=Sampling(0.5, 7), seed=3, max_context=40)
CHATML = "<|im_start|>{{ message['role'] }}\n{{ '<|im_start|>assistant\n' }}"


@pytest.fixture
def chat(tmp_path) -> Checkpoint:
    """The same with a chat template."""
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("{{ message['role'] }}",
                                                                 "message['role']"))  # fmt: skip
    return Checkpoint(PLAIN.path, CONFIG, TOKENIZER, load_chat(tmp_path, TOKENIZER))


def read(tmp_path, *lines, checkpoint=PLAIN, defaults=DEFAULTS):
    """An Input of these lines: bytes, texts, or what becomes JSON."""
    path, data = tmp_path / "in.jsonl", []
    for line in lines:
        text = line if isinstance(line, str | bytes) else json.dumps(line)
        data.append(text if isinstance(text, bytes) else text.encode())
    path.write_bytes(b"\n".join(data))
    return read_input(path, checkpoint, defaults)


def test_a_line_has_its_own_settings_and_the_command_line_has_the_others(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("Grüße\n", encoding="utf-8")
    given = read(
        tmp_path,
        {"prompt": "fox"},
        {"id": "b", "prompt_file": "sub/a.txt", "max_new_tokens": 3, "seed": 2**63 - 1},
        {"id": 7, "prompt": "c", "temperature": 1, "top_p": 0.9},
        {"prompt": "d", "temperature": 0, "top_p": 1, "stop": None},
        {"prompt": "e", "top_p": 1.0},
        {"prompt": "f", "max_new_tokens": 1, "top_k": 1, "seed": 0, "temperature": 1e38},
        defaults=Defaults(10, Sampling(0.5, 7, 0.8), 3, 40),
    )
    assert not given.bad and [line.number for line in given.lines] == [*range(1, 7)]
    assert [line.id for line in given.lines] == ["1", "b", "7", "4", "5", "6"]
    one, two, three, four, five, six = (line.request for line in given.lines)
    assert one.prompt == TOKENIZER.encode("fox") and one.max_new_tokens == 10
    assert one.sampling == Sampling(0.5, 7, 0.8) and one.stop is None
    assert two.prompt == TOKENIZER.encode("Grüße\n") and two.max_new_tokens == 3
    assert three.sampling == Sampling(1, 7, 0.9)
    assert four.sampling == Sampling()  # greedy: the command line's top_k means nothing to it
    assert five.sampling == Sampling(0.5, 7)
    assert (six.max_new_tokens, six.sampling.top_k, six.seed) == (1, 1, 0)
    assert [r.seed for r in (one, two, three, four)] == [
        row_seed(3, 0), 2**63 - 1, row_seed(3, 2), row_seed(3, 3)
    ]  # fmt: skip


def test_an_openai_batch_line_means_the_same_as_a_flat_one(tmp_path, chat):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Why?"},
    ]
    settings = {"temperature": 0.7, "top_p": 0.8, "seed": 5, "stop": "x"}
    body = {"model": "gpt", "messages": messages[:2], "max_tokens": 4, "n": None, **settings}
    del body["n"]
    given = read(
        tmp_path,
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"id": "b", "messages": messages[:2], "max_new_tokens": 4, **settings},
        {"custom_id": "c", "body": {"messages": messages, "max_completion_tokens": 5}},
        {"custom_id": "d", "body": {"prompt": "Hi", "max_tokens": None}},
        {"messages": messages[1:2]},
        checkpoint=chat, defaults=Defaults(10, Sampling(), 3, 99, "Be kind."),
    )  # fmt: skip
    assert not given.bad
    a, b, c, d, e = (line.request for line in given.lines)
    assert a.prompt == b.prompt == chat.chat.start("Hi", "Be brief.")
    assert (a.max_new_tokens, a.sampling, a.seed) == (b.max_new_tokens, b.sampling, b.seed)
    assert a.sampling == Sampling(0.7, None, 0.8) and a.stop.stops == b.stop.stops == ("x",)
    assert c.prompt == chat.chat.start("Why?", "Be brief.", ["Hi", "Hello!"])
    assert c.max_new_tokens == 5 and d.max_new_tokens == 10
    assert d.prompt == e.prompt == chat.chat.start("Hi", "Be kind.")


def test_marks_blank_lines_and_line_ends_of_other_systems(tmp_path):
    """Lines keep their numbers, and seeds follow the lines that are there."""
    text = '\ufeff\r\n{"prompt": "a\u2028b"}\r\n\n  \n{"prompt": "b\\r\\n"}'
    given = read(tmp_path, text)
    assert [(line.number, line.id) for line in given.lines] == [(2, "2"), (5, "5")]
    assert [line.request.seed for line in given.lines] == [row_seed(3, 0), row_seed(3, 1)]
    assert given.lines[0].request.prompt == TOKENIZER.encode("a\u2028b")
    assert given.lines[1].request.prompt == TOKENIZER.encode("b\r\n")


def user(text):
    return {"role": "user", "content": text}


GOOD = {"prompt": "a"}
BAD = [  # fifty kinds of lines, and what is said of them
    ("prompt", "not JSON"),
    ("{", "not JSON"),
    ('{"prompt": "a"} x', "not JSON"),
    ('{"prompt": "a",}', "not JSON"),
    ("{'prompt': 'a'}", "not JSON"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8 text (byte 15)"),
    ("[" * 10**5, "nested too deeply"),
    ("5", "5 is not a JSON object"),
    ("null", "None is not a JSON object"),
    ('["prompt"]', "['prompt'] is not a JSON object"),
    ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "9 is not a usable number"),
    ('{"prompt": "a", "temperature": NaN}', "NaN is not a usable number"),
    ('{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a usable number"),
    ('{"prompt": "a", "temperature": 1e999}', "1e999 is not a usable number"),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    ({}, "has no prompt; give one of prompt, prompt_file, messages"),
    ({"prompt": None}, "has no prompt"),
    ({"id": "x"}, "has no prompt"),
    ({"prompt": "a", "prompt_file": "b"}, "has prompt and prompt_file"),
    ({"text": "a"}, "the key 'text' is unknown; known: id, prompt"),
    ({"prompt": "a", "max_tokens": 5}, "the key 'max_tokens' is unknown"),
    ({"prompt": "a", "\ud800": 5}, "the key '\\ud800' is unknown"),
    ({"prompt": 5}, "prompt is 5, and should be a text"),
    ({"prompt": ["a"]}, "prompt is ['a']"),
    ({"prompt": ""}, "prompt is '', and should be a text that is not empty"),
    ({"prompt": "\ud800"}, "prompt is '\\ud800'"),
    ({"prompt": " a" * 31}, "31 tokens of prompt and 10 new ones are more than the context of 40"),
    ({"prompt": "a", "max_new_tokens": 40}, "1 tokens of prompt and 40 new ones"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens is True"),
    ({"prompt": "a", "max_new_tokens": 5.0}, "max_new_tokens is 5.0"),
    ({"prompt": "a", "temperature": "1"}, "temperature is '1', and should be a number"),
    ({"prompt": "a", "temperature": False}, "temperature is False"),
    ({"prompt": "a", "temperature": 1e39}, "temperature is 1e+39"),
    ({"prompt": "a", "temperature": -1}, "temperature -1 must be a number >= 0"),
    ({"prompt": "a", "temperature": 0, "top_k": 5}, "top_k and top_p need a temperature"),
    ({"prompt": "a", "top_k": 0}, "top_k is 0, and should be a whole number from 1 on"),
    ({"prompt": "a", "top_k": 2**63}, "top_k is 9223372036854775808"),
    ({"prompt": "a", "top_p": 0}, "top_p 0 must be in"),
    ({"prompt": "a", "top_p": 1.5}, "top_p 1.5 must be in"),
    ({"prompt": "a", "seed": 2**63}, "seed is 9223372036854775808"),
    ({"prompt": "a", "top_k": 2**31}, "top_k is 2147483648"),
    ({"prompt": "a", "seed": -1}, "seed is -1, and should be a whole number in 0..2**63 - 1"),
    ({"prompt": "a", "stop": ""}, "stop is '', and should be"),
    ({"prompt": "a", "stop": ["x", ""]}, "stop is ['x', '']"),
    ({"prompt": "a", "stop": {"x": 1}}, "stop is {'x': 1}"),
    ({"prompt": "a", "id": "1"}, "its id '1' is that of line 1"),
    ({"prompt": "a", "id": ""}, "id is ''"),
    ({"prompt": "a", "id": ["x"]}, "id is ['x']"),
    ({"prompt_file": "missing.txt"}, "missing.txt is no file"),
    ({"prompt_file": "."}, "is no file"),
    ({"prompt_file": "empty.txt"}, "empty.txt is empty"),
    ({"prompt_file": "latin.txt"}, "latin.txt is not UTF-8 text (byte 3)"),
    ({"prompt_file": "a\0b"}, "a\\x00b is no file"),
    ({"prompt_file": "x" * 5000}, "File name too long"),
    ({"custom_id": "c", "prompt": "a"}, "the key 'prompt' is unknown; known: custom_id, method"),
    ({"custom_id": "d"}, "has no prompt"),
    ({"body": ["a"]}, "body is ['a'], and should be an object"),
    ({"body": GOOD, "method": "GET"}, "method is 'GET', and should be POST"),
    ({"body": GOOD, "url": "/v1/embeddings"}, "url is '/v1/embeddings', and should be /v1/chat"),
    ({"body": GOOD | {"n": 2}}, "the key 'n' is unknown; known: model, prompt"),
    ({"body": GOOD | {"max_tokens": 2, "max_completion_tokens": 3}}, "are one thing"),
]  # fmt: skip
BAD_CHATS = [
    ([], "messages is []"),
    ("Hi", "messages is 'Hi'"),
    (["Hi"], "messages[0] is not an object with texts as role and content"),
    ([{"role": "user"}], "messages[0] is not"),
    ([user(["Hi"])], "messages[0] is not"),
    ([user("Hi") | {"name": "x"}], "messages[0] is not"),
    ([user("Hi"), user("Hi")], "messages are not user, assistant"),
    ([user("Hi"), {"role": "assistant", "content": "Hi"}], "messages are not user, assistant"),
    ([{"role": "system", "content": "Hi"}], "messages are not user, assistant"),
    ([{"role": "tool", "content": "Hi"}], "messages are not user, assistant"),
    ([user("")], "messages have an empty content"),
    ([user("\ud800")], "the text is not UTF-8"),
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    return tmp_path


def test_fifty_kinds_of_bad_lines_are_reported_together(files):
    assert len(BAD) >= 50
    given = read(files, GOOD, *(line for line, _ in BAD), GOOD)
    assert [line.number for line in given.lines] == [1, len(BAD) + 2]
    assert [line.number for line in given.bad] == [*range(2, len(BAD) + 2)]
    for line, (_, words) in zip(given.bad, BAD, strict=True):
        assert words in line.error and "\n" not in line.error and len(line.error) < 300, line
        json.dumps(line.record).encode()
        assert line.error.isprintable()
    report = str(BadLines(given.path, given.bad))
    head, *told, more = report.split("\n")
    assert head.startswith(f"{given.path}: {len(BAD)} lines cannot be used; ")
    assert "--skip_bad" in head and more == f"  and {len(BAD) - 20} more"
    for (number, line), (_, words) in zip(enumerate(told, start=2), BAD, strict=False):
        assert line.startswith(f"  line {number}: ") and words in line
    assert str(BadLines(given.path, given.bad[:20])).split("\n")[1:] == told
    one = str(BadLines(given.path, given.bad[:1]))
    assert one.count("\n") == 1 and "1 line cannot be used" in one


def test_bad_chats_are_bad_lines(tmp_path, chat):
    given = read(tmp_path, *({"messages": m} for m, _ in BAD_CHATS), checkpoint=chat)
    assert not given.lines and len(given.bad) == len(BAD_CHATS)
    for line, (_, words) in zip(given.bad, BAD_CHATS, strict=True):
        assert words in line.error
    given = read(tmp_path, {"id": "q", "messages": [user("Hi")]})
    assert given.bad[0].record == {
        "line": 1, "id": "q",
        "error": "messages need the checkpoint's chat template: give --chat",
    }  # fmt: skip


def test_an_error_record_has_the_id_only_if_it_is_known(tmp_path):
    given = read(tmp_path, "{", {"id": ["x"], "prompt": "a"}, {"custom_id": "c"}, {})
    assert [line.id for line in given.bad] == [None, None, "c", "4"]
    assert given.bad[0].record.keys() == {"line", "error"}


def test_bad_lines_leave_the_seeds_of_the_others_alone(tmp_path):
    """Corrected or skipped: the other lines get the same texts."""
    skipped = read(tmp_path, GOOD, "{", GOOD).lines
    corrected = read(tmp_path, GOOD, GOOD, GOOD).lines
    assert skipped[1].request.seed == corrected[2].request.seed


def test_the_sum_is_of_the_files_that_are_named_too(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    sums = {read(tmp_path, GOOD).sha256, read(tmp_path, {"prompt_file": "a.txt"}).sha256}
    (tmp_path / "a.txt").write_text("two")
    sums.add(read(tmp_path, {"prompt_file": "a.txt"}).sha256)
    assert len(sums) == 3


@pytest.mark.parametrize("nothing", ["", "\n \n"])
def test_no_prompts_at_all(tmp_path, nothing):
    with pytest.raises(ValueError, match='in.jsonl has no prompts: a line is {"prompt": "..."}'):
        read(tmp_path, nothing)
    with pytest.raises(OSError):
        read_input(tmp_path / "nowhere.jsonl", PLAIN, DEFAULTS)


def slow_stop(prompt, ids, stops):
    """The first prefix of the answer in whose text a stop text stands, and the text before it."""
    for n in range(1, len(ids) + 1):
        text = continuation(TOKENIZER, prompt, ids[:n])
        found = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        if found:
            return n, text[: min(found)[1]]
    return None


TEXT = "The fox 漢字 é👩‍👩‍👧 jumps over\n\nthe lazy dog. The end.\n"


def test_stop_texts_end_an_answer_where_the_whole_text_says_so():
    """Random texts, split over tokens and characters over bytes; told in random portions."""
    rng = random.Random(0)
    prompt, ids = TOKENIZER.encode("Once "), TOKENIZER.encode(TEXT, bos=False)
    n_found = 0
    for _ in range(200):
        places = [rng.randrange(len(TEXT) - 5) for _ in range(rng.randint(1, 3))]
        stops = tuple(TEXT[p : p + rng.randint(1, 5)] for p in places)
        stop = StopTexts(TOKENIZER, prompt, stops)
        n, end = 0, None
        while n < len(ids) and end is None:
            n = min(n + rng.randint(1, 6), len(ids))
            end = stop(ids[:n])
        assert (end, stop.text) == slow_stop(prompt, ids, stops)
        n_found += end > 1
    assert n_found > 100


def test_a_character_of_many_tokens_is_complete_with_the_last_of_them():
    ids = TOKENIZER.encode("漢x", bos=False)
    assert len(ids) > 2
    stop = StopTexts(TOKENIZER, [], ("漢",))
    assert [stop(ids[:n]) for n in range(1, len(ids))] == [None] * (len(ids) - 2) + [len(ids) - 1]


def test_of_two_stop_texts_the_one_that_ends_first_counts():
    """Whatever their order, and although one token may complete both."""
    token = TOKENIZER.encode(" the", bos=False)
    assert len(token) == 1
    for stops in ((" the", "h"), ("h", " the")):
        stop = StopTexts(TOKENIZER, [], stops)
        assert stop(token) == 1 and stop.text == " t"
    stop = StopTexts(TOKENIZER, [], ("he", "the"))
    assert stop(token) == 1 and stop.text == " "


def test_a_stop_text_in_the_prompt_ends_nothing():
    prompt = TOKENIZER.encode("a STOP")
    stop = StopTexts(TOKENIZER, prompt, ("STOP", "OPa"))
    assert stop(TOKENIZER.encode("a", bos=False)) is None


def test_a_second_run_of_a_request_is_seen_as_one():
    ids = TOKENIZER.encode("one two three", bos=False)
    stop = StopTexts(TOKENIZER, [], ("three",))
    end = stop(ids)
    assert end == len(ids) == stop(ids + ids) and stop(ids[:1]) is None
    assert stop(ids) == end and stop.text == "one two "


def test_each_token_is_decoded_once(monkeypatch):
    stop, lengths = StopTexts(TOKENIZER, [], ("never",)), []
    decode = TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    ids = TOKENIZER.encode(TEXT * 20, bos=False)
    for n in range(1, len(ids)):
        assert stop(ids[:n]) is None
    assert max(lengths) < 50 and len(lengths) < 3 * len(ids)


def test_the_text_of_an_answer_ends_before_what_ended_it(tmp_path):
    end = TOKENIZER.special("<|im_end|>")
    ids = TOKENIZER.encode("one two three", bos=False)
    plain, stopped = (
        line.request
        for line in read(tmp_path, GOOD, GOOD | {"stop": [" three", "<|im_end|>"]}).lines
    )
    assert answer_text(TOKENIZER, plain, [*ids, end], (end,)) == "one two three"
    assert answer_text(TOKENIZER, plain, ids, (end,)) == "one two three"
    assert answer_text(TOKENIZER, plain, [end], (end,)) == ""
    assert answer_text(TOKENIZER, stopped, ids, (end,)) == "one two"
    assert answer_text(TOKENIZER, stopped, ids[:2], (end,)) == TOKENIZER.decode(ids[:2])
    assert answer_text(TOKENIZER, stopped, [*ids[:2], end], ()) == TOKENIZER.decode(ids[:2])
