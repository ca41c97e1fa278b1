"""LoRA beside megatron-core's parallel linears: low-rank updates that are added to what a frozen linear gives.

Every Hugging Face linear has factors of its own, as under PEFT, also where Megatron multiplies several of them at once.
With tensor-parallel size t, a rank holds

    linear sharded on outputs   A whole             B [outputs / t, r]
    linear sharded on inputs    A [r, inputs / t]   B whole

and only r numbers a position travel between the ranks. A factor that is whole is alike on all of them. Under sequence
parallelism each rank multiplies it with its piece of the sequence, so that its gradient is a part of the sum:
megatron-core adds these up for parameters that are marked ``sequence_parallel``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from dc_megatron.config import AdaptedLinear, HuggingFaceLinear, LoraConfig


class LoraFactor(nn.Module):
    """A matrix without bias. A module, so that whoever waits in forward hooks for its weight is heard."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]"""
        return nn.functional.linear(x, self.weight)


class Adapter(nn.Module):
    """``lora_A`` and ``lora_B`` of one Hugging Face linear: this rank's part of them, in fp32.

    They begin as PEFT's do: A uniform within 1 / sqrt(inputs) (torch's default for a linear), B zero. A comes from
    ``seed`` and the linear's name alone, so that every layout starts alike.
    """

    def __init__(self, part: HuggingFaceLinear, name: str, r: int, row_parallel: bool, seed: int, config, group):
        super().__init__()
        down, outputs = initial_factor(name, r, part.inputs, seed), part.outputs
        if row_parallel:
            down = down.chunk(group.size(), dim=1)[group.rank()].clone()
        else:
            outputs //= group.size()
        self.lora_A, self.lora_B = LoraFactor(down), LoraFactor(torch.zeros(outputs, r))
        sharded, whole = (self.lora_A, self.lora_B) if row_parallel else (self.lora_B, self.lora_A)
        self._sharded_dims = {"lora_A.weight": 1} if row_parallel else {"lora_B.weight": 0}
        set_tensor_model_parallel_attributes(sharded.weight, True, 1 if row_parallel else 0, 1)
        whole.weight.sequence_parallel = config.sequence_parallel
        self._group = group

    @torch.no_grad()
    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Take this rank's part of whole factors; ``read`` gets lora_A.weight or lora_B.weight."""
        for name, parameter in self.named_parameters():
            whole = read(name)
            if name in self._sharded_dims:
                whole = whole.chunk(self._group.size(), dim=self._sharded_dims[name])[self._group.rank()]
            assert whole.shape == parameter.shape, f"{name}: {tuple(whole.shape)}, not {tuple(parameter.shape)}"
            parameter.copy_(whole)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries: a tensor under each parameter's own name, whole in the tree."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._sharded_dims,
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def initial_factor(name: str, r: int, inputs: int, seed: int) -> Tensor:
    """PEFT's start of ``lora_A`` of the linear ``name``, fp32 [r, inputs]: kaiming_uniform_(a=sqrt(5))."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = inputs**-0.5
    return torch.empty(r, inputs).uniform_(-bound, bound, generator=generator)


class LoraAdapters(nn.Module):
    """The adapters of this rank's layers; parameters are ``<Hugging Face's module name>.lora_{A,B}.weight``.

    Making it hooks it into the linears of ``model``, which keep their names and their checkpoint entries.
    """

    def __init__(self, model: GPTModel, linears: Sequence[AdaptedLinear], lora: LoraConfig, seed: int):
        super().__init__()
        config, group = model.config, model.pg_collection.tp
        for layer in model.decoder.layers:
            for linear in linears:
                adapters = []
                for part in linear.parts:
                    name = part.name.format(layer=layer.layer_number - 1)
                    adapters.append(Adapter(part, name, lora.r, linear.row_parallel, seed, config, group))
                    _place(self, name, adapters[-1])
                _hook(layer.get_submodule(linear.module), linear, adapters, lora, config, group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Checkpoint entries of all adapters; layers are counted over the whole model, whatever the layout."""
        state = {}
        for name, adapter in self._adapters():
            state.update(adapter.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Take the factors of this rank's layers; ``read`` gives a whole one by the name of its parameter here."""
        for name, adapter in self._adapters():
            adapter.fill(lambda factor, name=name: read(f"{name}.{factor}"))

    def _adapters(self) -> Iterator[tuple[str, Adapter]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Adapter))


def _place(root: nn.Module, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` below ``root`` under a dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(last, adapter)


def _hook(base: nn.Module, linear: AdaptedLinear, adapters: list[Adapter], lora: LoraConfig, config, group) -> None:
    """Have ``base`` add the adapters' update to its result.

    Linears of Transformer Engine that begin with a norm hand out what the norm made; in FP8 that is not yet rounded, so
    the adapters compute in the run's own dtype there too.
    """
    has_norm = hasattr(base, "return_layernorm_output")
    if has_norm:
        base.return_layernorm_output = True
    update = _rows_update if linear.row_parallel else _columns_update
    blocks = linear.blocks // group.size() or 1

    def add(_module, arguments: tuple, output: tuple) -> tuple:
        result, bias, normed = _taken_apart(output) if has_norm else (*output, arguments[0])
        # Positions of a piece, and inputs of a shard, are other ones on every rank.
        differs = linear.row_parallel or config.sequence_parallel
        down = _downwards(normed, adapters, lora.dropout if base.training else 0.0, differs and group.size() > 1)
        return result + lora.scaling * update(down, adapters, blocks, config, group).to(result.dtype), bias

    base.register_forward_hook(add)


def _taken_apart(output: tuple) -> tuple:
    """(result, bias or None, output of the norm) as megatron-core's TELayerNormColumnParallelLinear returns them."""
    if len(output) == 3:
        return output
    (result, normed), bias = output
    return result, bias, normed


def _downwards(x: Tensor, adapters: list[Adapter], dropout: float, differs: bool) -> Tensor:
    """A x of all adapters side by side; each drops inputs of its own, as under PEFT."""
    if not dropout:
        return torch.cat([adapter.lora_A(x) for adapter in adapters], dim=-1)
    fork = tensor_parallel.get_cuda_rng_tracker().fork() if differs else contextlib.nullcontext()
    with fork:
        return torch.cat([adapter.lora_A(nn.functional.dropout(x, dropout)) for adapter in adapters], dim=-1)


def _columns_update(down: Tensor, adapters: list[Adapter], blocks: int, config, group) -> Tensor:
    """This rank's outputs [s, b, outputs / t] from ``down`` [s or s / t, b, r of each adapter], alike on all ranks."""
    if group.size() > 1:
        # Backward: the ranks' gradients are added up, since each comes from other outputs.
        spread: Callable = copy_to_tensor_model_parallel_region
        if config.sequence_parallel:
            spread = gather_from_sequence_parallel_region
        down = spread(down, group=group)
    pieces = down.chunk(len(adapters), dim=-1)
    outputs = [adapter.lora_B(piece) for adapter, piece in zip(adapters, pieces, strict=True)]
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([output.unflatten(-1, (blocks, -1)) for output in outputs], dim=-1).flatten(-2)


def _rows_update(down: Tensor, adapters: list[Adapter], _blocks: int, config, group) -> Tensor:
    """All outputs [s or s / t, b, outputs] from ``down`` [s, b, r], to which each rank's inputs add a part."""
    if group.size() > 1:
        join: Callable = reduce_from_tensor_model_parallel_region
        if config.sequence_parallel:
            join = reduce_scatter_to_sequence_parallel_region
        down = join(down, group=group)
    return adapters[0].lora_B(down)
