"""Threads that wait sleep instead of spinning, and most tests have only one.

The models of the tests are tiny: on busy cores, OpenMP's threads would spin for nine tenths of the
time. It has to be said before torch is imported; processes that tests start inherit it. And waking
a second thread takes longer than what it would do. What is compiled is compiled for all threads:
those tests say "compil" in their names.
"""

import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
from pathlib import Path

import pytest
import torch

from checkpoint import DEMO_CHECKPOINT
from scripts.save_model import save_model
from tests.reference import tiny_model
from tokenizer import load_tokenizer

THREADS = torch.get_num_threads()
FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(THREADS if "compil" in request.node.name else 1)


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    """A calibration goes on until it is long and steady enough: no test needs such good medians."""
    monkeypatch.setattr("auto.SHORT", 0.0)
    monkeypatch.setattr("auto.STEADY", math.inf)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A tiny random model with the demo's tokenizer."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_model(tiny_model(vocab_size=4096), path, max_position_embeddings=300, eos_token_id=2)
    shutil.copy(DEMO_CHECKPOINT / "tokenizer.model", path)
    return path


@pytest.fixture
def chat_checkpoint(tmp_path) -> Path:
    """A tiny random model with a ChatML template and the tokenizer of the fixtures."""
    path = tmp_path / "chat"
    shutil.copytree(FIXTURES / "qwen3", path)
    tokenizer = load_tokenizer(path)
    end = tokenizer.special("<|im_end|>")
    save_model(tiny_model(vocab_size=tokenizer.vocab_size), path, max_position_embeddings=300,
               eos_token_id=end)  # fmt: skip
    (path / "chat_template.jinja").write_text(CHATML + "<|im_start|>assistant\n")
    return path
