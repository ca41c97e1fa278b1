"""What a rank does for the tests of the planner's memory: the bytes that autograd keeps of one decoder layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from dc_megatron.config import LanguageConfig, padded_vocab_size
from dc_megatron.model.language_model import Layout, build_language_model, transformer_config
from dc_megatron.runtime import parallel


def bytes_of_a_layer(language: LanguageConfig, length: int, learns: bool, bf16: bool) -> int:
    """Of a packed row of two samples, ``length`` positions together: what three layers keep more than two."""
    parallel.start()
    return _kept(language, 3, length, learns, bf16) - _kept(language, 2, length, learns, bf16)


def _kept(language: LanguageConfig, layers: int, length: int, learns: bool, bf16: bool) -> int:
    dtype = torch.bfloat16 if bf16 else torch.float32
    language = replace(language, num_hidden_layers=layers)
    model = build_language_model(
        language,
        transformer_config(language, Layout(params_dtype=dtype)),
        vocab_rows=padded_vocab_size(language.vocab_size, 1),
        max_sequence_length=length,
        transformer_engine=False,
    ).to(dtype)
    model.requires_grad_(learns)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    bounds = torch.tensor([0, length // 2, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length // 2,
        max_seqlen_kv=length // 2,
    )
    hidden = torch.randn(length, 1, language.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The storages stay alive in ``kept``, so no address is used twice.
        model(None, None, None, decoder_input=hidden, packed_seq_params=packed)
    return sum(storage.nbytes() for storage in kept.values())
