"""One rank of a job of any size, built by Megatron's own engine on the meta device: shapes without memory.

The process group is torch's ``fake`` one, whose collectives return at once, so that one process can be any rank. What
is built is the engine's model, gradient buffers and optimizer, not a sketch of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from dc_megatron.config import ImageTiling, VisionConfig, image_share
from dc_megatron.model.image_shares import image_group
from dc_megatron.model.multimodal_model import DenseConnectorModel
from dc_megatron.model.row_pieces import row_pieces
from dc_megatron.runtime import cpu_device


@dataclass(frozen=True)
class RankCount:
    """What a rank holds, in numbers (not bytes); layers: decoder layers of its chunks.

    data_rank: among all ranks with the same weights, context-parallel ones as well. buffers: of gradients, padding
    included. updates: those that the rank's optimizer has states for.
    """

    rank: int
    tensor_rank: int
    data_rank: int
    stage: int
    layers: tuple[int, ...]
    parameters: int
    trainable: int
    buffers: int
    updates: int


@contextlib.contextmanager
def as_rank(rank: int, world_size: int, args) -> Iterator[None]:
    """Inside, this process is ``rank`` of a fake world of ``world_size`` with the groups that ``args`` ask for."""
    from megatron.training.global_vars import set_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch.distributed.is_initialized(), "a dry run needs a process without process groups"
    args.rank = rank
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            create_gloo_process_groups=False,
        )
        with cpu_device.on_meta(), quiet():
            tensor_parallel.model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
            set_args(args)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The engine tells about every layout it makes; here it makes many."""
    loud = logging.getLogger("megatron")
    kept = loud.level
    loud.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        loud.setLevel(kept)


def build(provider: Callable) -> list:
    """This rank's chunks as training has them: in 16 bits where it says so, over gradient buffers."""
    from megatron.training.training import get_model

    with cpu_device.BuiltOnMeta():
        return get_model(provider)


def models_of(chunks: list) -> list[DenseConnectorModel]:
    """The models inside."""
    return unwrap_model(chunks)


def count(chunks: list, args) -> RankCount:
    """Numbers of this rank's parameters, gradient buffers and optimizer; the optimizer is the engine's."""
    from megatron.training.training import get_megatron_optimizer_config

    models = models_of(chunks)
    parameters = [parameter for model in models for parameter in model.parameters()]
    updates = 0
    if any(parameter.requires_grad for parameter in parameters):
        config, overrides = get_megatron_optimizer_config(args)
        optimizer = get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)
        updates = sum(one.numel() for group in optimizer.param_groups for one in group["params"])
    return RankCount(
        rank=args.rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        layers=tuple(len(model.language_model.decoder.layers) for model in models),
        parameters=sum(one.numel() for one in parameters),
        trainable=sum(one.numel() for one in parameters if one.requires_grad),
        buffers=sum(buffer.numel for chunk in chunks for buffer in chunk.buffers),
        updates=updates,
    )


def pass_shapes(chunks: list, batch: dict) -> None:
    """One micro-batch of shapes forward and backward through every chunk, with the first and the last of its layers.

    Those between are of the same shapes. Raises whatever torch or Megatron says of shapes that do not fit.
    """
    for chunk, model in zip(chunks, models_of(chunks), strict=True):
        layers = model.language_model.decoder.layers
        with _only_outer(model):
            if not model.pre_process:
                model.set_input_tensor(_hidden_states(model, batch))
            out = chunk(batch)
            if out.requires_grad:
                with chunk.no_sync():
                    out.backward(torch.empty_like(out))
        assert len(model.language_model.decoder.layers) == len(layers), "layers were not put back"


@contextlib.contextmanager
def _only_outer(model: DenseConnectorModel) -> Iterator[None]:
    """The first and the last decoder layer alone."""
    decoder = model.language_model.decoder
    kept, counted = decoder.layers, decoder.num_layers_per_pipeline_rank
    if len(kept) > 2:
        decoder.layers = torch.nn.ModuleList([kept[0], kept[-1]])
        decoder.num_layers_per_pipeline_rank = 2
    try:
        yield
    finally:
        decoder.layers, decoder.num_layers_per_pipeline_rank = kept, counted


def _hidden_states(model: DenseConnectorModel, batch: dict) -> Tensor:
    config = model.config
    rows, length = batch["input_ids"].shape
    pieces = config.tensor_model_parallel_size if config.sequence_parallel else 1
    dtype = config.pipeline_dtype or config.params_dtype
    return torch.empty(length // pieces, rows, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)


def shapes_of_batch(args, vision: VisionConfig, tiling: ImageTiling, images: int, targets: int, packed: bool) -> dict:
    """The batch contract of the data room on the meta device, ``images`` tiles and ``targets`` supervised positions.

    The bounds of samples are real numbers on the CPU, where kernels of packed rows read them: two samples a row. Under
    context parallelism this rank's part, with an equal share of images' positions and targets.
    """

    def empty(*shape: int, dtype=torch.long) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, length = args.micro_batch_size, args.seq_length
    most = (rows * length) // tiling.most_tokens
    images = max(1, min(images, most))
    sharing = image_group(ProcessGroupCollection.use_mpu_process_groups())
    share = len(image_share(images, sharing.rank(), sharing.size()))
    context = args.context_parallel_size
    places, own = images * tiling.tile_tokens // context, length // context
    batch = {
        "input_ids": empty(rows, own),
        "position_ids": empty(rows, own),
        "labels": empty(rows, own),
        "image_mask": empty(rows, own, dtype=torch.bool),
        "image_places": empty(places),
        "image_feature_index": empty(places),
        "target_places": empty(max(1, min(targets // context, rows * own))),
        "num_images": images,
        "pixel_values": empty(share, 3, vision.image_size, vision.image_size, dtype=torch.float32),
    }
    if packed:
        bounds = [0, length // 2, length]
        batch |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_seqlen": length - length // 2}
        if context > 1:
            pieces = row_pieces(bounds, parallel_state.get_context_parallel_rank(), context)
            batch["row_pieces"] = replace(pieces, places=empty(own))
    return batch
