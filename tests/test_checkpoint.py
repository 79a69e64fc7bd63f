"""A checkpoint directory, opened once: what belongs together, and what is said when it does not."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint import DEMO_CHECKPOINT, eos_token_ids, load_model, open_checkpoint
from config import MODELS, ModelConfig
from families import load_config
from model import Block, Transformer
from scripts.save_model import save_model
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


def load(path) -> Transformer:
    return load_model(path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_load_model_reads_what_is_there(tmp_path, n_shards, tied):
    model = tiny_model(7, 1, tie_embeddings=tied)
    save_model(model, tmp_path, n_shards, eos_token_id=[2, 5])
    loaded = load(tmp_path)
    assert loaded.config == model.config
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens, tokens), model(tokens, tokens))
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert eos_token_ids(tmp_path) == (2, 5)


def one_tensor(offsets: list[int], shape: list[int], n_bytes: int, dtype: str = "F32") -> bytes:
    """A safetensors file whose header says this of its one tensor, with so many bytes behind."""
    header = {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(n_bytes)


@pytest.mark.parametrize(
    "content, words",
    [
        (one_tensor([0, 4 * 40], [40], 80), "corrupt or incomplete"),  # data cut off
        (one_tensor([0, 4 * 40], [40], 400), "corrupt or incomplete"),  # more than was said
        (one_tensor([0, 4 * 40], [80], 160), "corrupt or incomplete"),  # shape against offsets
        (one_tensor([0, 2**63], [2**61], 16), "corrupt or incomplete"),
        (one_tensor([0, 16], [2**40, 2**40], 16), "corrupt or incomplete"),  # overflows
        ((2**62).to_bytes(8, "little") + b"{}", "corrupt or incomplete"),  # endless header
        (b"", "corrupt or incomplete"),
        (one_tensor([0, 4 * 41], [41], 164), r"misshapen: model.norm.weight \[41\], .* \[40\]"),
        (one_tensor([0, 40], [40], 40, "I8"), "dtype I8; supported: F64, F32, F16, BF16"),
        (one_tensor([0, 160], [40], 160), "missing: model.embed_tokens.weight, .* more"),
    ],
)
def test_headers_are_checked_before_anything_is_allocated(tmp_path, monkeypatch, content, words):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(Transformer, "to_empty", lambda *args, **how: pytest.fail("too late"))
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_sizes_are_checked_before_layers_are_built(tmp_path, monkeypatch):
    """Building a hundred thousand layers takes most of a minute, without any weights in them."""
    save_model(tiny_model(), tmp_path, num_hidden_layers=10**5)
    built = []
    monkeypatch.setattr("model.Block", lambda config: built.append(0) or Block(config))
    with pytest.raises(ValueError, match="missing: model.layers.2."):
        load(tmp_path)
    assert len(built) <= 3
    monkeypatch.setattr("device.free_memory", lambda device: 2**30)
    with pytest.raises(ValueError, match="weights of .* need .* but cpu has 1.0 GiB free"):
        load(tmp_path)
    assert len(built) <= 3


def test_a_tensor_may_be_in_one_shard_only(tmp_path):
    save_model(tiny_model(), tmp_path, n_shards=2)
    one, two = sorted(tmp_path.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00002.*is in model-00001-of-00002"):
        load(tmp_path)


def test_an_index_without_files_is_refused(tmp_path):
    """No files are not `random:`."""
    save_model(tiny_model(), tmp_path, n_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in ({}, None, [], {"a": None}, {"a": "b", "c": 5}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(
            ValueError, match="index.json has no object weight_map that names files"
        ):
            load(tmp_path)
    for name in ("", "."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=f"shard {name!r} is not a file name in this"):
            load(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers: what an index beside it says is left over."""
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    save_model(old, tmp_path, n_shards=2)
    save_model(new, tmp_path)
    assert torch.equal(load(tmp_path).norm.weight, new.norm.weight)
    save_model(old, tmp_path, n_shards=3)  # must not be hidden by the single file of before
    assert torch.equal(load(tmp_path).norm.weight, old.norm.weight)


@pytest.mark.parametrize("dtype, bad", [("float32", torch.nan), ("float32", -torch.inf),
                                        ("float16", 1e5)])  # fmt: skip
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, dtype, bad):
    model = tiny_model()
    model.layers[1].feed_forward.w_gate_up.weight.data[60, 3] = bad
    save_model(model, tmp_path)
    words = rf"model.safetensors: model.layers.1.mlp.up_proj.weight has NaN or .* {dtype}"
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, torch.device("cpu"), getattr(torch, dtype))


@contextmanager
def without_privileges():
    """As a user who may not read everything, also where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_weights_that_may_not_be_read_are_not_called_missing():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        save_model(tiny_model(), path)
        (path / "model.safetensors").chmod(0)
        with without_privileges(), pytest.raises(PermissionError, match="model.safetensors"):
            load(path)


def test_a_path_that_is_not_utf8_is_not_called_corrupt(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.mkdir()
    save_model(tiny_model(), path.parent)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(path / name)
    with pytest.raises(ValueError, match="paths in UTF-8 only; rename the directory"):
        load(path)


def test_pickles_are_not_opened(tmp_path):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, .* never opened"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_not_loaded(tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path)
    monkeypatch.setattr("device.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"weights of .* need 0.0 GiB, .*; use a smaller model"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_into_the_dtype_that_was_asked_for(tmp_path, dtype):
    model = tiny_model()
    save_model(model, tmp_path)
    seen = []
    loaded = load_model(tmp_path, torch.device("cpu"), dtype, lambda *now: seen.append(now))
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))
    total = sum(p.nbytes for p in loaded.parameters())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_random_weights_of_a_presets_geometry(monkeypatch):
    monkeypatch.setitem(
        MODELS, "tiny", ModelConfig(32, 2, 4, 2, 8, 48, 99, 500, tie_embeddings=True)
    )
    config = load_config(Path("random:tiny"))
    assert (config.dim, config.n_kv_head, config.max_seq_len) == (32, 2, 500)
    model = load_model(Path("random:tiny"), torch.device("cpu"), torch.float32)
    assert model.output.weight is model.tok_embeddings.weight
    logits = model(torch.tensor([[3, 4]]), torch.tensor([[0, 1]]))
    assert logits.isfinite().all() and logits.std() > 0
    gemma = replace(config, norm_plus_one=True, qk_norm=True)
    for traits, expected in ((config, 1), (gemma, 0)):  # all norms begin as nothing but a norm
        monkeypatch.setitem(MODELS, "tiny", traits)
        model = load_model(Path("random:tiny"), torch.device("cpu"), torch.float32)
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        assert all((p == expected).all() for p in norms)
    with pytest.raises(ValueError, match="model 'tinny' is unknown; known: llama-2-7b"):
        load_config(Path("random:tinny"))
    for name in ("llama-3.1-8b", "qwen2.5-7b"):
        assert load_config(Path(f"random:{name}")).n_layer == MODELS[name].n_layer


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load(tmp_path)
    save_model(tiny_model(), tmp_path, n_shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match="not a file name|not exist"):
            load(tmp_path)
    for content, words in [("{}", "no object weight_map"), ("[]", "not hold a JSON object"),
                           ('{"a":' * 10**5, "not valid JSON")]:  # fmt: skip
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(tmp_path)
    for ids in ('"</s>"', "[1, null]", "1e3", "9" * 30, "true"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id = .* not a tok"):
            eos_token_ids(tmp_path)
