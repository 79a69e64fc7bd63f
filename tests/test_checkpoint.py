"""A checkpoint directory, opened once: what belongs together, and what is said when it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint import DEMO_CHECKPOINT, open_checkpoint, save_model
from tests.reference import tiny_model
from tokenizer import NumberTokenizer, load_tokenizer

CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "<|im_start|>assistant\n"
)


@pytest.fixture
def chat_directory(tmp_path) -> Path:
    """A tiny random model with a ChatML template and the tokenizer of the fixtures."""
    path = tmp_path / "chat"
    shutil.copytree(Path(__file__).parent / "fixtures/tokenizers/qwen3", path)
    n = load_tokenizer(path).vocab_size
    save_model(tiny_model(vocab_size=n), path, eos_token_id=[3, 3])
    (path / "chat_template.jinja").write_text(CHATML)
    return path


def test_a_directory_is_opened_without_its_weights(chat_directory):
    weights = chat_directory / "model.safetensors"
    hidden = weights.rename(chat_directory / "hidden")
    checkpoint = open_checkpoint(chat_directory)
    assert checkpoint.path == chat_directory and checkpoint.config.dim == 40
    assert checkpoint.chat is None and checkpoint.end_ids(16) == (3,)
    hidden.rename(weights)
    (chat_directory / "config.json").write_text("{}")  # it is not read again
    sizes: list[tuple[int, int]] = []
    model = checkpoint.load(CPU, torch.bfloat16, lambda *size: sizes.append(size))
    total = sum(p.nbytes for p in model.parameters())
    assert sizes[0] == (0, total) and sizes[-1] == (total, total)
    assert model.config is checkpoint.config and model.norm.weight.dtype == torch.bfloat16


def test_text_is_encoded_as_the_directory_has_it(chat_directory):
    plain, chat = open_checkpoint(chat_directory), open_checkpoint(chat_directory, chat=True)
    assert plain.encode("fox") == plain.tokenizer.encode("fox")
    assert chat.encode("fox") == chat.chat.start("fox") != plain.encode("fox")
    assert chat.encode("fox", "Be brief.") == chat.chat.start("fox", "Be brief.")
    assert plain.encode("") == chat.encode("") == []
    end = chat.tokenizer.special("<|im_end|>")
    assert chat.end_ids(16) == (3, end)
    (chat_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert chat.end_ids(16) == (end,)
    with pytest.raises(ValueError, match=r"1 tokens end a text \(eos_token_id\); at most 0"):
        chat.end_ids(0)
    assert chat.encode("fox", None, [5, 6]) == [5, 6, *chat.chat.reply("fox")]
    assert plain.encode("fox", None, [5, 6]) == plain.encode("fox")


def test_a_chat_that_is_not_there_is_refused_only_if_it_is_asked_for(chat_directory):
    (chat_directory / "chat_template.jinja").unlink()
    assert open_checkpoint(chat_directory).chat is None
    with pytest.raises(ValueError, match="no chat_template"):
        open_checkpoint(chat_directory, chat=True)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_model(tiny_model(vocab_size=100), tmp_path)
    shutil.copy(DEMO_CHECKPOINT / "tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match="has 4096 tokens, the model only 100: they do not belong"):
        open_checkpoint(tmp_path)
    save_model(tiny_model(vocab_size=4100), tmp_path)  # rows that are padding are no harm
    open_checkpoint(tmp_path)


def test_random_weights_have_numbers_for_a_tokenizer():
    checkpoint = open_checkpoint(Path("random:llama-3.1-8b"))
    assert isinstance(checkpoint.tokenizer, NumberTokenizer)
    assert checkpoint.tokenizer.vocab_size == checkpoint.config.vocab_size
    assert checkpoint.end_ids(16) == ()


def test_models_of_one_vocabulary_draft_for_each_other(chat_directory):
    demo, other = open_checkpoint(DEMO_CHECKPOINT), open_checkpoint(chat_directory)
    demo.check_same_vocabulary(open_checkpoint(DEMO_CHECKPOINT.with_name("demo-draft")))
    with pytest.raises(ValueError, match=r"chat cannot draft for .*demo: they have \d+ and 4096"):
        demo.check_same_vocabulary(other)
