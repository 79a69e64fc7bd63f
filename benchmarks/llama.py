"""A model in llama.cpp, through its C functions, as the package llama-cpp-python has them.

A context has a sequence per row, each in a KV cache of its own. Nothing of the tokenizer is needed:
tokens go in, logits come out.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import hf_weights
from model import Transformer


def write_gguf(model: Transformer, path: Path) -> None:
    """The model in llama.cpp's format, float32, without a tokenizer.

    llama.cpp turns neighbouring pairs of a Llama's heads, x_2i and x_2i+1, where checkpoints of
    Hugging Face have x_i and x_i+D/2: the rows of Q and K change places.
    """
    import gguf

    c = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.n_layer)
    file = gguf.GGUFWriter(path, "llama")
    file.add_file_type(gguf.LlamaFileType.ALL_F32)
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(c.vocab_size)
    file.add_context_length(c.max_seq_len)
    file.add_block_count(c.n_layer)
    file.add_embedding_length(c.dim)
    file.add_feed_forward_length(c.ffn_dim)
    file.add_head_count(c.n_head)
    file.add_head_count_kv(c.n_kv_head)
    file.add_key_length(c.head_dim)
    file.add_value_length(c.head_dim)
    file.add_rope_dimension_count(c.head_dim)
    file.add_rope_freq_base(c.rope_theta)
    file.add_layer_norm_rms_eps(c.norm_eps)
    for name, weights in hf_weights(model):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weights.view(-1, 2, c.head_dim // 2, c.dim)
            weights = halves.transpose(1, 2).reshape(weights.shape)
        file.add_tensor(names.get_name(name, (".weight",)), weights.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


class LlamaCpp:
    """A context of llama.cpp with a sequence per row, and a batch to hand tokens over in."""

    def __init__(self, model: Transformer, rows: int, length: int, kv: str, flash: bool) -> None:
        """K and V of type `kv`, F32 or F16, for `length` tokens a row. RuntimeError if it fails."""
        import llama_cpp
        from numpy import ctypeslib

        self.api, self.as_array = llama_cpp, ctypeslib.as_array
        self.quiet = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self.quiet, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo.gguf"
            write_gguf(model, path)
            how = llama_cpp.llama_model_default_params()
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise RuntimeError("llama.cpp did not load the model")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_seq_max = rows * (length + -length % 256), rows
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        how.type_k = how.type_v = getattr(llama_cpp, f"GGML_TYPE_{kv}")
        how.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(how.n_batch, 0, 1)

    def next_tokens(self, texts: dict[int, Sequence[int]], start: int) -> list[int]:
        """Append these tokens to rows that hold `start`; the greedy choice after each text."""
        batch, n = self.batch, 0
        for row, tokens in texts.items():
            for pos, token in enumerate(tokens, start=start):
                batch.token[n], batch.pos[n] = token, pos
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = pos == start + len(tokens) - 1
                n += 1
        batch.n_tokens = n
        if error := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {error}")
        shape = len(texts), self.n_vocab
        logits = self.as_array(self.api.llama_get_logits(self.context), shape)
        return logits.argmax(axis=-1).tolist()

    def prefill(self, row: int, prompt: Sequence[int]) -> int:
        """The first new token of a row."""
        size = self.api.llama_n_ubatch(self.context)
        for start in range(0, len(prompt), size):
            (first,) = self.next_tokens({row: prompt[start : start + size]}, start)
        return first

    def rewind(self, row: int, length: int) -> None:
        """Forget all of a row but its first tokens."""
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(memory, row, length, -1)
