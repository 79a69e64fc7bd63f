"""Chat templates without a template engine.

A directory's chat template is a Jinja program. The families that this project runs use few formats,
each known by lines that stand in all of its templates. A format is written down here, as layouts.
Default system prompt, dates and BOS vary within a family and are read from the template. A layout
is text with control tokens in it:

    <|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n

A control token of this tokenizer becomes its id. All else is text, and text that touches is joined
before it is encoded, as in the whole text that Jinja would give. What somebody says is always text:
"<|im_end|>" typed by a user ends nothing.

A conversation is `start`, the model's answer, `reply`, its answer, `reply`. Each gives only the new
ids, to be appended to the KV cache. So answers stay as the model gave them: rendering all of it
again would trim them and drop Qwen3's thoughts. And Mistral's system prompt stays in the first
turn, where the templates since v0.3 move it into the last one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from config import Json
from tokenizer import SentencePieceTokenizer, Tokenizer, tokenizer_config


@dataclass(frozen=True, slots=True)
class Format:
    """The layouts of a chat format."""

    name: str
    known_by: tuple[str, ...]  # all are in the template without blanks, quotes and +; ¶: newline
    system: str  # what the model is told before the first turn, or where {told} is in it
    turn: str  # what a user says, up to the model's answer
    end: str  # the token that ends the answer
    answer: str = "{answer}"  # what the model has said, where somebody else tells of it
    after: str = ""  # between the answer's end and the next turn
    inside: bool = False  # the system prompt is part of what the user says first
    strip: tuple[str, ...] = ()  # "user", "answer", ...: blanks around what they say are dropped


FORMATS = (
    Format(
        "Llama 3",
        ("<|start_header_id|>message[role]<|end_header_id|>¶¶message[content]|trim<|eot_id|>",),
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        turn="<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strip=("user", "system", "answer"),
    ),
    Format(
        "ChatML (Qwen)",
        ("<|im_start|>message[role]¶", "<|im_start|>assistant¶"),
        system="<|im_start|>system\n{system}<|im_end|>\n",
        turn="<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
    Format(
        "Llama 2",
        ("bos_token[INST]content", "<<SYS>>"),
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        turn="[INST] {user} [/INST]",
        end="{eos}",
        answer=" {answer} ",
        after="{bos}",
        inside=True,
        strip=("user", "answer"),
    ),
    Format(
        "Mistral",
        ("[INST]message[content][/INST]",),
        system="{system}\n\n",
        turn="[INST] {user} [/INST]",
        end="{eos}",
        answer=" {answer}",
        inside=True,
    ),
    Format(
        "Zephyr (TinyLlama)",
        ("<|user|>¶message[content]eos_token}}¶",),
        system="<|system|>\n{system}{eos}\n",
        turn="<|user|>\n{user}{eos}\n<|assistant|>\n",
        end="{eos}",
        after="\n",
    ),
    Format(
        "Gemma",
        ("<start_of_turn>role¶", "<start_of_turn>model¶"),
        system="{system}\n\n",
        turn="<start_of_turn>user\n{told}{user}<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        after="\n",
        strip=("user", "answer"),
    ),
    Format(
        "Phi-3",
        ("<|user|>¶message[content]<|end|>¶", "<|assistant|>¶"),
        system="<|system|>\n{system}<|end|>\n",
        turn="<|user|>\n{user}<|end|>\n<|assistant|>\n",
        end="<|end|>",
        after="\n",
    ),
)
OTHERS = ("<|im_sep|>", "[SYSTEM_PROMPT]", "eliftrue==true")  # of formats that only look alike


@dataclass(frozen=True, slots=True)
class Chat:
    """A format, with a tokenizer and what the directory's template adds to it."""

    tokenizer: Tokenizer
    format: Format
    ids: dict[str, int | None]  # of "{bos}" and "{eos}"; None: there is none
    end_id: int  # ends the model's answers
    system: str | None  # the system prompt where none is given
    preamble: str  # put before every system prompt

    def start(self, user: str, system: str | None = None, before: Sequence[str] = ()) -> list[int]:
        """Ids of a conversation up to the model's answer; `system` replaces the default.

        `before` are earlier turns: what a user said, the answer to it, and so on.
        """
        form, said = self.format, [*before, user]
        layout, system = form.turn, self.system if system is None else system
        if form.inside and system is not None:
            said[0] = form.system.replace("{system}", system) + said[0]
        elif system is not None or self.preamble:
            told = form.system
            layout = layout.replace("{told}", told) if "{told}" in layout else told + layout
        layout += (form.answer + form.end + form.after + form.turn) * (len(said) // 2)
        return self.encode("{bos}" + layout, said, system or "")

    def reply(self, user: str, ended: bool = False) -> list[int]:
        """Ids that follow the model's answer up to its next one.

        An answer that was cut short lacks its end token (`ended` is False) and gets one here.
        """
        end = "" if ended else self.format.end
        return self.encode(end + self.format.after + self.format.turn, [user])

    def encode(self, layout: str, said: Sequence[str], system: str = "") -> list[int]:
        """Ids of a layout: control tokens as such, the rest as text, joined where it touches.

        What was `said` stands in turn where the layout has {user} and {answer}.
        """
        strip, turns = self.format.strip, iter(said)
        system = system.strip() if "system" in strip else system
        words = {"{system}": self.preamble + system, "{told}": ""}
        ids: list[int] = []
        text, bare = "", False  # bare: behind a token that takes the blanks behind it
        for part in re.split(r"(\{\w+\}|<\|\w+\|>|<\w+_of_turn>|\[/?INST\])", layout):
            token = self.ids[part] if part in self.ids else self.tokenizer.special(part)
            if token is not None:
                ids += [*self.tokenizer.encode(text, bos=False), token]
                text = ""
                bare = part in self.tokenizer.added and self.tokenizer.added[part].rstrip
            elif part in ("{user}", "{answer}"):
                word = next(turns)
                text += word.strip() if part[1:-1] in strip else word
            elif part not in self.ids:
                text += words.get(part, part)
            text = text.lstrip() if bare else text
        return ids + self.tokenizer.encode(text, bos=False)


def load_chat(checkpoint_dir: Path, tokenizer: Tokenizer, today: date | None = None) -> Chat:
    """The chat format of a checkpoint directory; `today` is the date that Llama 3.2 is told.

    Raises ValueError if the directory has no chat template, one of no known format, or no token
    that ends an answer.
    """
    path, template = read_template(checkpoint_dir)
    form = recognise(path, template)
    if form.name == "Mistral" and tokenizer.special("[INST]") is not None:  # since v0.3
        spaced = "[INST] " in template and not isinstance(tokenizer, SentencePieceTokenizer)
        space = " " * spaced  # sentencepiece puts it there itself
        form = replace(form, turn=f"[INST]{space}{{user}}[/INST]", answer=f"{space}{{answer}}")
    if re.search(r"<\|im_start\|>assistant(\\n|\n)<think>", template):
        form = replace(form, turn=form.turn + "<think>\n")
    config = tokenizer_config(checkpoint_dir)
    ids = {"{bos}": named(config, "bos_token", tokenizer), "{eos}": None}
    if "bos_token" not in template:
        ids["{bos}"] = None
    if "eos_token" in template:
        ids["{eos}"] = named(config, "eos_token", tokenizer)
    end_id = ids.get(form.end, tokenizer.special(form.end))
    if end_id is None:
        end = form.end.replace("{eos}", "eos_token of tokenizer_config.json")
        raise ValueError(f"{path}: {form.name} chats end with {end}, which is no token here")
    system, before = default_system(template), preamble(template, today)
    return Chat(tokenizer, form, ids, end_id, system, before)


def named(config: Json, field: str, tokenizer: Tokenizer) -> int | None:
    """The id of the token that tokenizer_config.json names, as text or as an object.

    None where it names none. Raises ValueError if it is neither.
    """
    token = config[field]
    token = token["content"] if isinstance(token.value, dict) else token
    return tokenizer.special(token.of(str)) if token.value is not None else None


def read_template(checkpoint_dir: Path) -> tuple[Path, str]:
    """File and text of the chat template; chat_template.jinja goes first, as in transformers.

    Raises ValueError if there is none.
    """
    path = checkpoint_dir / "chat_template.jinja"
    if path.is_file():
        return path, path.read_text(encoding="utf-8", errors="replace")
    template = tokenizer_config(checkpoint_dir)["chat_template"]
    if isinstance(template.value, list):
        several = {t["name"].of(str): t["template"] for t in template}
        template = several.get("default", replace(template, value=None))
    if template.value is None:
        raise ValueError(
            f"{template.path} has no chat_template, and there is no {path.name}: "
            "this model is not made for chats, or its template is missing"
        )
    return template.path, template.of(str)


def recognise(path: Path, template: str) -> Format:
    """The format whose marks the template has. Raises ValueError if it is none of ours."""
    compact = re.sub(r"[ \t'\"+]", "", re.sub(r"\\n|\r?\n", "¶", template))
    compact = re.sub(r"message\.(role|content)", r"message[\1]", compact)
    for form in FORMATS:
        if all(mark in compact for mark in form.known_by) and not any(o in compact for o in OTHERS):
            return form
    raise ValueError(
        f"{path}: this chat template is of no known format; supported are "
        + ", ".join(form.name for form in FORMATS)
    )


def default_system(template: str) -> str | None:
    """ChatML's default system prompt, where it is a part of a literal: '...system\\nYou are...'."""
    begin, end = r"<\|im_start\|>system(?:\\n|\n)", r"<\|im_end\|>"
    match = re.search(begin + r"((?:[^'\"\\]|\\.)*?)" + end, template)
    return match and re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), match[1])


def preamble(template: str, today: date | None) -> str:
    """The lines about dates that Llama 3.1 and later get; "" where the template has none."""
    if "Cutting Knowledge Date" not in template:
        return ""
    fixed = re.search(r'date_string = "([^"]+)"', template)
    day = (today or date.today()).strftime("%d %b %Y")
    if "strftime_now" not in template and fixed:
        day = fixed[1]
    return f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n"
