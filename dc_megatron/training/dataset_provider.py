"""The data as Megatron's engine asks for it: an iterator that starts where the run stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args

from dc_megatron.config import VisionConfig
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.loader import MicroBatches
from dc_megatron.errors import UserError
from dc_megatron.model.dealt_images import dealing_place
from dc_megatron.model.image_shares import image_group
from dc_megatron.runtime import device
from dc_megatron.training.data_plan import Data
from dc_megatron.training.fp8_flags import length_multiple
from dc_megatron.training.validation import Validation


def make_dataset_provider(
    data: Data,
    vision: VisionConfig,
    loaders: list[MicroBatches],
    on_ready: Callable[[], object],
    ahead: Callable[[MicroBatches], Iterator[dict]] | None = None,
    validation: Validation | None = None,
) -> Callable:
    """``train_valid_test_dataset_provider`` of ``megatron.training.pretrain``; training's is added to ``loaders``.

    Nodes that found other samples are refused before the first step. ``on_ready`` is called last: the model is there by
    then, and the first step begins.

    Every data-parallel rank reads its own rows; pixels are decoded on the first pipeline stage only, where tensor- and
    context-parallel ranks decode a share each. With ``ahead`` the ranks of all stages decode, and the iterator is what
    it makes of the loader.
    """

    def provider(train_valid_test_num_samples, vp_stage: int | None = None):
        args = get_args()
        _refuse_different_plans(data.plan_hash, "--data_path")
        first_chunk = not vp_stage
        decodes = first_chunk and parallel_state.get_pipeline_model_parallel_rank() == 0
        dealt = ahead is not None and first_chunk
        loader = _micro_batches(data, vision, args, decodes or dealt, args.consumed_train_samples, dealt)
        loaders.append(loader)
        held_out = None
        if validation is not None:
            _refuse_different_plans(validation.plan_hash, "--eval_data_path")
            # Its rows begin anew with every evaluation, so none is left over from an earlier run.
            held_out = _micro_batches(validation, vision, args, decodes, 0)
        on_ready()
        return ahead(loader) if dealt else loader, held_out, None

    # Every rank makes its own iterator; the engine broadcasts nothing.
    provider.is_distributed = True
    return provider


def _micro_batches(
    data: Data | Validation, vision: VisionConfig, args, decodes: bool, start_row: int, dealt: bool = False
) -> MicroBatches:
    """This rank's micro-batches of ``data``; pixels where it ``decodes``, ``dealt``: over the ranks of all stages."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    sharing = image_group(groups)
    return MicroBatches(
        data.index,
        data.rows,
        data.config,
        vision,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        image_share=dealing_place(groups) if dealt else (sharing.rank(), sharing.size()),
        deal_images=dealt,
        decode_images=decodes,
        stores=open_stores(data.config.sources, cache=data.folder) if decodes else None,
        start_row=start_row,
        # Under sequence parallelism every tensor-parallel rank takes an equal piece of a row.
        length_multiple=length_multiple(args.fp8, args.tensor_model_parallel_size),
        image_threads=max(1, args.num_workers),
        pin_memory=device.has_cuda(),
    )


def _refuse_different_plans(plan: str, flag: str) -> None:
    """UserError on every rank where the nodes do not agree about which samples there are, and in which order."""
    plans: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(plans, plan)
    different = [rank for rank, other in enumerate(plans) if other != plans[0]]
    if different:
        raise UserError(
            f"{flag}: ranks {', '.join(map(str, different[:8]))} found other usable samples than rank 0; the data"
            " file and the pictures must be the same on all nodes"
        )
