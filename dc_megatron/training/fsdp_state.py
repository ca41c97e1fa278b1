"""Checkpoints of a run under Megatron-FSDP: the trees of any other run, each rank writing the rows that it keeps.

Megatron-FSDP divides every parameter by rows over the data-parallel ranks, not evenly, and megatron-core saves such a
model in a format of its own (``fsdp_dtensor``). But a torch_dist tree says of each piece where it belongs, so rows are
written as they are: without gathering, and into what the tools read and a run of any layout resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dc_megatron.model.multimodal_model import NEWLINE
from dc_megatron.training.parameter_groups import fill_moments
from dc_megatron.training.unwrapped import unwrapped

_SHARDING_TYPE = "fully_reshardable"


class DividedState:
    """What a rank keeps of the model and the optimizer, as entries of a torch_dist tree."""

    def __init__(self, chunk: FullyShardedDataParallel, optimizer: MegatronOptimizer):
        self._fsdp, self._optimizer = chunk.module, optimizer
        self._group = chunk.megatron_fsdp_dist_index.get_dp_group()
        kept = dict(self._fsdp.param_and_grad_buffer.optimizer_named_parameters)
        self._kept = {raw: kept[name] for name, raw in self._fsdp.raw_param.items()}
        lengths: list = [None] * self._group.size()
        torch.distributed.all_gather_object(lengths, [len(_local(p)) for p in self._kept.values()], self._group)
        # Raw parameter -> the rows that each rank keeps, first rank first.
        self._lengths = dict(zip(self._kept, zip(*lengths, strict=True), strict=True))
        self._fsdp.module.register_forward_pre_hook(self._gather_what_is_no_layer)
        # Where what is loaded belongs: name in the state -> rows.
        self._model_targets: dict[str, Tensor] = {}
        self._optimizer_targets: dict[str, Tensor] = {}
        chunk.load_state_dict = self._take_model
        optimizer.load_state_dict = self._take_optimizer

    def sizes(self) -> tuple[int, int]:
        """(numbers of weights that this rank keeps, of all weights of its model-parallel rank)."""
        return sum(_local(p).numel() for p in self._kept.values()), sum(raw.numel() for raw in self._kept)

    def _gather_what_is_no_layer(self, *_) -> None:
        """Every rank gathers tower, connector, embedding and head alike when a micro-batch begins.

        Megatron-FSDP gathers a module's weights when it is called. But a rank without pictures does not call the tower,
        and would answer the others with another gathering; and the loss reads the head's weights without calling it.
        """
        groups = self._fsdp.param_and_grad_buffer.parameter_groups
        others = [parameter for group in groups if group.fsdp_unit_id is None for parameter in group.params]
        self._fsdp.all_gather_and_wait_parameters_ready(others, prefetch=False)

    def tell(self) -> None:
        """A line about it, by the first rank of all."""
        kept, whole = self.sizes()
        if torch.distributed.get_rank() == 0:
            print(f"Megatron-FSDP: this rank keeps {kept:,} of {whole:,} weights, over {self._group.size()} ranks")

    def entries(self, generate: Callable[[], dict], with_optimizer: bool, loading: bool) -> dict:
        """The state of the engine's ``generate()``, which must leave out the optimizer, with this rank's rows."""
        with self._whole_shapes():
            state = generate()
        whole = state["model"]
        state["model"] = self._model_entries(whole, loading, with_optimizer)
        if with_optimizer:
            if loading:
                fill_moments(self._optimizer)
            state["optimizer"] = self._optimizer_entries(whole, loading)
        return state

    @contextlib.contextmanager
    def _whole_shapes(self) -> Iterator[None]:
        """Inside, the model has its whole parameters, whose memory is given back: the tree is laid out by their shapes.

        The rows' tensors say the shape over all tensor-parallel ranks.
        """
        fsdp = self._fsdp
        fsdp._replace_param_with_raw_if_needed()
        # Whoever asks for a state is given the rows otherwise.
        fsdp.is_param_fsdp_distributed = True
        try:
            yield
        finally:
            fsdp.is_param_fsdp_distributed = False
            fsdp._replace_param_with_distributed_if_needed()

    def whole(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """The named parameters in full, on every rank; all ranks of the group must call it."""
        raw_names = {id(p): raw for raw, kept in self._kept.items() for p in (raw, kept)}
        return {name: self._gathered(raw_names[id(p)]) for name, p in parameters}

    def _gathered(self, raw: nn.Parameter) -> Tensor:
        lengths, rows = self._lengths[raw], _local(self._kept[raw])
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(raw.dtype)

    def _model_entries(self, whole: dict, loading: bool, with_optimizer: bool) -> dict:
        state = {}
        for name, entry in whole.items():
            raw = self._parameter_of(entry)
            if raw is None:
                state[name] = entry
                continue
            rows = _local(self._kept[raw])
            # Of what learns in bf16 the rank keeps fp32 numbers; the tree has the model's own type.
            stored = rows if rows.dtype == raw.dtype else rows.to(raw.dtype)
            for place, (piece, span) in enumerate(self._pieces(entry, raw, stored, entry.key)):
                state[f"{name}/{place}"] = piece
                # What learns is read as the optimizer's fp32 numbers where those are read.
                if loading and not (with_optimizer and raw.requires_grad):
                    self._model_targets[f"{name}/{place}"] = rows[span]
        return state

    def _optimizer_entries(self, whole: dict, loading: bool) -> dict:
        state = self._optimizer.state_dict()
        moments = self._optimizer.optimizer.state
        parts: dict[str, ShardedTensor] = {}
        for name, entry in whole.items():
            raw = self._parameter_of(entry)
            if raw is None or not raw.requires_grad:
                continue
            kept = self._kept[raw]
            tensors = {"param": kept, **{kind: moment for kind, moment in moments[kept].items() if kind != "step"}}
            for kind, tensor in tensors.items():
                rows = _local(tensor)
                for place, (piece, span) in enumerate(
                    self._pieces(entry, raw, rows, f"optimizer.state.{kind}.{entry.key}")
                ):
                    parts[f"{name}/{kind}/{place}"] = piece
                    if loading:
                        self._optimizer_targets[f"{name}/{kind}/{place}"] = rows[span]
        state["param_state"] = parts
        state["param_state_sharding_type"] = _SHARDING_TYPE
        return state

    def _parameter_of(self, entry) -> nn.Parameter | None:
        """The whole parameter that an entry stands for; None: it is something else, or not divided."""
        data = getattr(entry, "data", None)
        return data if isinstance(data, nn.Parameter) and data in self._kept else None

    def _pieces(self, entry, raw: nn.Parameter, rows: Tensor, key: str) -> Iterator[tuple[ShardedTensor, slice]]:
        """This rank's ``rows`` of an entry for the whole parameter: (its entry, its place in ``rows``).

        A factory stands for several tensors on top of each other (the two halves of a gated MLP), which lie apart in
        the tree where there is tensor parallelism.
        """
        start = sum(self._lengths[raw][: self._group.rank()])
        stop, top = start + len(rows), 0
        for part in _parts(entry, raw):
            low, high = max(start, top), min(stop, top + part.local_shape[0])
            if low < high:
                span = slice(low - start, high - start)
                yield _piece(part, rows[span], low - top, key), span
            top += part.local_shape[0]

    def _take_model(self, state_dict: dict, strict: bool = True) -> None:
        """In place of the engine's ``load_state_dict``."""
        _put(state_dict, self._model_targets)
        self._fsdp.install_optimized_model_weights()
        model = unwrapped([self._fsdp])[0]
        # What was given from elsewhere counts for one load only.
        model.connector_is_given = model.newline_is_given = model.tower_is_given = False

    def _take_optimizer(self, state_dict: dict) -> None:
        """In place of the engine's ``load_state_dict``: moments, fp32 weights and the groups' rates and steps."""
        _put(state_dict["param_state"], self._optimizer_targets)
        self._fsdp.install_optimized_model_weights()
        saved = {_identity(group): group for group in state_dict["optimizer"]["param_groups"]}
        for group in self._optimizer.optimizer.param_groups:
            group.update(saved[_identity(group)])
        if self._optimizer.grad_scaler and "grad_scaler" in state_dict:
            self._optimizer.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a divided tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _parts(entry, raw: nn.Parameter) -> list[ShardedTensor]:
    """The tensors of the tree that an entry for the whole parameter stands for, top row first."""
    if not isinstance(entry, ShardedTensorFactory):
        return [entry]
    shape = torch.empty(raw.shape, dtype=raw.dtype, device="meta")
    return entry.build_fn(entry.key, shape, entry.replica_id, None)


def _piece(part: ShardedTensor, rows: Tensor, below: int, key: str) -> ShardedTensor:
    """``rows`` of ``part``, beginning ``below`` its first one."""
    leading = part.prepend_axis_num
    offset = list(part.global_offset)
    offset[leading] += below
    shape = (1,) * leading + tuple(rows.shape)
    return ShardedTensor(
        key,
        rows.view(shape),
        rows.dtype,
        shape,
        part.global_shape,
        tuple(offset),
        # No regular grid: ranks keep different numbers of rows.
        None,
        replica_id=(*part.replica_id[:-1], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


@torch.no_grad()
def _put(read: dict, targets: dict[str, Tensor]) -> None:
    """Copy what was not read into its place at once."""
    for name, target in targets.items():
        if read[name].data_ptr() != target.data_ptr():
            target.copy_(read[name].view(target.shape))
    targets.clear()


def _identity(group: dict) -> tuple:
    return tuple(group.get(key) for key in param_group_identifier_keys)


def state_hook(original: Callable, session) -> Callable:
    """``generate_state_dict`` for a model that Megatron-FSDP divides."""

    def generate_state_dict(args, model, optimizer, *others, **more):
        if session.divided is None:
            return original(args, model, optimizer, *others, **more)
        model = unwrapped(model)
        connector, newline = model[0].connector, model[0].image_newline
        loading = bool((more.get("optim_sd_kwargs") or {}).get("is_loading"))
        if not loading and next(connector.parameters()).requires_grad:
            trained = [*connector.named_parameters(), *([] if newline is None else [(NEWLINE, newline)])]
            model[0].whole_connector = session.divided.whole(trained)
        with_optimizer = optimizer is not None and not args.no_save_optim
        return session.divided.entries(
            lambda: original(args, model, None, *others, **more), with_optimizer=with_optimizer, loading=loading
        )

    return generate_state_dict
