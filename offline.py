"""Files of prompts, line by line: what is asked, and with which settings.

A line is a request, as one flat object or as a line of OpenAI's batch files:

    {"id": "a", "prompt": "...", "max_new_tokens": 64, "temperature": 0.8, "stop": ["\\n\\n"]}
    {"custom_id": "b", "body": {"messages": [{"role": "user", "content": "..."}]}}

All lines are read and encoded before anything runs. What cannot be used is reported together, or
left out and recorded. Nothing is guessed: an unknown key may be a wish that is not fulfilled, a key
that is there twice says two things.

What a line does not say, the command line says (`Defaults`). A line's seed comes from the command's
seed and the line's place. So its text does not depend on what else runs, or when.

Stop texts are looked for in text, and engines count tokens. `StopTexts` stands between: it tells
with which token the first stop text is complete. That token belongs to the answer, and the text of
the answer ends before the stop text.
"""

import codecs
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

from batch import Request
from checkpoint import Checkpoint
from prompts import read_text
from sampling import Sampling, row_seed
from tokenizer import TextStream, Tokenizer, continuation, surrogate

MAX_REPORTED = 20  # bad lines
MAX_REASON = 250  # characters
MAX_DIGITS = 40  # of a whole number, before its value matters


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for a line that does not say otherwise."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    max_context: int  # tokens of prompt and answer; no line says otherwise
    system: str | None = None  # of chats; None: the template's own


class Line(NamedTuple):
    """A request and where it stands."""

    number: int  # from 1
    id: str
    request: Request


class BadLine(NamedTuple):
    """A line that cannot be used."""

    number: int  # from 1
    id: str | None  # where it could be read
    error: str

    @property
    def record(self) -> dict:
        """Its line of the output."""
        return {k: v for k, v in zip(("line", "id", "error"), self, strict=True) if v is not None}


class BadLines(ValueError):
    """The report on all lines that cannot be used, a line for each."""

    def __init__(self, path: Path, bad: Sequence[BadLine]) -> None:
        lines = [f"  line {line.number}: {line.error}" for line in bad[:MAX_REPORTED]]
        more = len(bad) - MAX_REPORTED
        lines += [f"  and {more} more"] if more > 0 else []
        n = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
        head = f"{path}: {n} cannot be used; correct them, or leave them out with --skip_bad"
        super().__init__("\n".join([head, *lines]))


class Input(NamedTuple):
    """A file of requests."""

    path: Path
    lines: list[Line]
    bad: list[BadLine]
    sha256: str  # of the file and of all that it names


# What a key may hold, and how that is called. null is as if the key were not there.
Kind = tuple[Callable[[Any], bool], str]
TEXT: Kind = (lambda v: type(v) is str and surrogate(v) is None, "a text")
SOME_TEXT: Kind = (lambda v: TEXT[0](v) and v != "", "a text that is not empty")
COUNT: Kind = (lambda v: type(v) is int and 1 <= v < 2**31, "a whole number from 1 on")
NUMBER: Kind = (lambda v: type(v) in (int, float) and abs(v) < 2**127, "a number")  # of 32 bits
ANY: Kind = (lambda v: True, "")
OPTIONS: dict[str, Kind] = {
    "max_new_tokens": COUNT,
    "temperature": NUMBER,
    "top_k": COUNT,
    "top_p": NUMBER,
    "seed": (lambda v: type(v) is int and 0 <= v < 2**63, "a whole number in 0..2**63 - 1"),
    "stop": (
        lambda v: all(map(SOME_TEXT[0], v if type(v) is list else [v])),
        "a text or a list of texts, none of them empty",
    ),
}
SOURCES: dict[str, Kind] = {
    "prompt": SOME_TEXT,
    "prompt_file": SOME_TEXT,
    "messages": (lambda v: type(v) is list and len(v) > 0, "a list of messages"),
}
ID: Kind = (lambda v: type(v) is int or SOME_TEXT[0](v), "a text that is not empty")
FLAT = {"id": ID} | SOURCES | OPTIONS
BATCH: dict[str, Kind] = {  # of OpenAI's batch files
    "custom_id": ID,
    "method": (lambda v: v == "POST", "POST"),
    "url": (
        lambda v: v in ("/v1/chat/completions", "/v1/completions"),
        "/v1/chat/completions or /v1/completions",
    ),
    "body": (lambda v: type(v) is dict, "an object"),
}
LIMITS = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # three names of one thing
BODY = {"model": ANY} | SOURCES | OPTIONS | dict.fromkeys(LIMITS, COUNT)


def read_input(path: Path, checkpoint: Checkpoint, defaults: Defaults) -> Input:
    """Read and check a file of requests. OSError if it cannot be read, ValueError if it is empty.

    A line's seed follows from its place among the lines that are not blank.
    """
    data = path.read_bytes()
    sha256, owners = hashlib.sha256(data), dict[str, int]()
    lines: list[Line] = []
    bad: list[BadLine] = []
    numbered = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    for place, (number, text) in enumerate((n, t) for n, t in numbered if t.strip()):
        name = None
        try:
            value = parse(text)
            name = given_id(value, str(number))
            if name and owners.setdefault(name, number) != number:
                raise ValueError(f"its id {brief(name)} is that of line {owners[name]}")
            record = flatten(value)
            if "prompt_file" in record:
                record["prompt"] = read_prompt_file(path.parent / record["prompt_file"])
                sha256.update(record["prompt"].encode())
            request = make_request(record, place, checkpoint, defaults)
            lines.append(Line(number, name or "", request))
        except (ValueError, OSError) as e:
            bad.append(BadLine(number, name, printable(str(e))))
    if not lines and not bad:
        raise ValueError(f'{path} has no prompts: a line is {{"prompt": "..."}}')
    return Input(path, lines, bad, sha256.hexdigest())


def printable(text: str) -> str:
    """One line of a report, whatever is in the names that it quotes."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)[:MAX_REASON]


def parse(text: bytes) -> dict:
    """The object of a line of JSON. ValueError says why it is none."""
    try:
        value = json.loads(
            text.decode(),
            parse_int=read_number,
            parse_float=read_number,
            parse_constant=read_number,
            object_pairs_hook=unique,
        )
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 text (byte {e.start})") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg}, at character {e.pos}") from None
    except RecursionError:
        raise ValueError("not usable JSON: its lists and objects are nested too deeply") from None
    if type(value) is not dict:
        raise ValueError(f"{brief(value)} is not a JSON object")
    return value


def read_number(digits: str) -> float:
    """A number of JSON. ValueError for one without an end, or without a sensible one."""
    whole = digits.lstrip("-").isdecimal()
    value = math.nan if whole and len(digits) > MAX_DIGITS else (int if whole else float)(digits)
    if not math.isfinite(value):
        raise ValueError(f"{brief(digits)[1:-1]} is not a usable number")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON. ValueError if a key is there twice: which of both is meant?"""
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"the key {brief(key)} is there twice")
        record[key] = value
    return record


def given_id(value: dict, default: str) -> str | None:
    """The id that a line gives itself; None if that is none."""
    name = value.get("custom_id", value.get("id"))
    return default if name is None else str(name) if ID[0](name) else None


def flatten(value: dict) -> dict:
    """What a line says, under the keys of a flat line. ValueError as in `check`, and no prompt."""
    if "body" not in value and "custom_id" not in value:
        record = check(value, FLAT)
    else:
        record = check(check(value, BATCH).get("body", {}), BODY)
        limits = {record.pop(key) for key in LIMITS if key in record}
        if len(limits) > 1:
            raise ValueError(f"{' and '.join(LIMITS)} are one thing; give one of them")
        for limit in limits:
            record["max_new_tokens"] = limit
    sources = [key for key in SOURCES if key in record]
    if len(sources) != 1:
        what = " and ".join(sources) or "no prompt"
        raise ValueError(f"has {what}; give one of {', '.join(SOURCES)}")
    return record


def check(record: dict, kinds: dict[str, Kind]) -> dict:
    """The fields that are not null. ValueError names a key that is unknown or of another kind."""
    for key, value in record.items():
        if key not in kinds:
            raise ValueError(f"the key {brief(key)} is unknown; known: {', '.join(kinds)}")
        fits, name = kinds[key]
        if value is not None and not fits(value):
            raise ValueError(f"{key} is {brief(value)}, and should be {name}")
    return {key: value for key, value in record.items() if value is not None}


def read_prompt_file(path: Path) -> str:
    """The text of a file. OSError if there is none, ValueError if it is no text or empty."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"prompt_file {path} is no file")
    text = read_text(path)
    if not text:
        raise ValueError(f"prompt_file {path} is empty")
    return text


def make_request(record: dict, place: int, checkpoint: Checkpoint, d: Defaults) -> Request:
    """A line's request. ValueError for a prompt that is too long, or settings that do not fit."""
    if "messages" in record:
        prompt = encode_messages(record["messages"], checkpoint, d.system)
    else:
        prompt = checkpoint.encode(record["prompt"], d.system)
    if not prompt:
        raise ValueError("the prompt has no tokens")
    limit = record.get("max_new_tokens", d.max_new_tokens)
    if len(prompt) + limit > d.max_context:
        raise ValueError(
            f"{len(prompt)} tokens of prompt and {limit} new ones are more than the context of "
            f"{d.max_context}"
        )
    own = {key: record[key] for key in asdict(d.sampling) if key in record}
    if own.get("top_p") == 1:  # which clients write for none, also where it is greedy
        own["top_p"] = None
    others = asdict(d.sampling) if own.get("temperature") != 0 else {}
    stops = record.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    stop = StopTexts(checkpoint.tokenizer, prompt, tuple(stops)) if stops else None
    seed = record.get("seed", row_seed(d.seed, place))
    return Request(prompt, limit, Sampling(**others | own), seed, stop)


def encode_messages(messages: list, checkpoint: Checkpoint, system: str | None) -> list[int]:
    """Ids of a conversation up to the answer that it asks for. ValueError for what is none."""
    if checkpoint.chat is None:
        raise ValueError("messages need the checkpoint's chat template: give --chat")
    for n, message in enumerate(messages):
        keys = message.keys() if type(message) is dict else set()
        if keys != {"role", "content"} or not all(type(v) is str for v in message.values()):
            raise ValueError(f"messages[{n}] is not an object with texts as role and content")
    roles = [message["role"] for message in messages]
    said = [message["content"] for message in messages]
    if roles[0] in ("system", "developer"):  # OpenAI has renamed it
        system, roles, said = said[0], roles[1:], said[1:]
    turns = [("user", "assistant")[n % 2] for n in range(len(roles))]
    if roles != turns or len(roles) % 2 == 0:
        raise ValueError("messages are not user, assistant, ... user, with system first or not")
    if not all(said):
        raise ValueError("messages have an empty content")
    return checkpoint.chat.start(said[-1], system, said[:-1])


class StopTexts:
    """Ends an answer with the token that completes one of these texts. A `stop` of a Request.

    Each token is decoded once, behind those before it. Of two texts that a token completes, the one
    that ends first counts, as it would with shorter tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: tuple[str, ...]) -> None:
        self.tokenizer, self.prompt, self.stops = tokenizer, prompt, stops
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.stream = TextStream(self.tokenizer, self.prompt)
        self.seen: list[int] = []
        self.text = ""  # of what was seen; of a complete answer, what stands before the stop text
        self.complete = False

    def __call__(self, new_ids: list[int]) -> int | None:
        """How many of an answer's tokens belong to it; None: no stop text has come yet."""
        if new_ids[: len(self.seen)] != self.seen:
            self.begin()  # told of another run
        for token in new_ids[len(self.seen) :]:
            if self.complete:
                break
            self.seen.append(token)
            self.add(self.stream.feed([token]))
        return len(self.seen) if self.complete else None

    def add(self, text: str) -> None:
        """Append to the text, and look for stop texts that end in what is new."""
        old, self.text = len(self.text), self.text + text
        found = []
        for stop in self.stops if text else ():
            place = self.text.find(stop, max(old + 1 - len(stop), 0))
            if place >= 0:
                found.append((place + len(stop), place))
        if found:
            self.complete, self.text = True, self.text[: min(found)[1]]


def answer_text(
    tokenizer: Tokenizer, request: Request, token_ids: list[int], end_ids: Sequence[int]
) -> str:
    """The text of an answer, up to its stop text or the token that ended it."""
    if isinstance(request.stop, StopTexts) and request.stop(token_ids) is not None:
        return request.stop.text
    ended = token_ids[-1] in end_ids
    return continuation(tokenizer, request.prompt, token_ids[:-1] if ended else token_ids)
