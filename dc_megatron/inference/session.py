"""A model ready to answer or to be scored, from whatever source, at any tensor and pipeline parallel size."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dc_megatron.config import padded_vocab_size
from dc_megatron.data.image_loading import ImageLoader, image_loader
from dc_megatron.inference.source import Resolved, check_world
from dc_megatron.runtime import device, installed, parallel, patches
from dc_megatron.weights.projector_sources import refuse_other_tower


class Runner:
    """Forward passes without gradients through a model that every rank of its groups holds a part of.

    ``model``: the module that the schedule calls, wrapped or not, in evaluation mode. ``keeps_keys``: whether a token's
    pass may rest on keys and values of those before it; a model that is set up for training has no place for them.
    """

    keeps_keys = False

    def __init__(self, resolved: Resolved, model):
        self.resolved = resolved
        self.device = device.device()
        self.model = model
        self._loaders: dict[str, ImageLoader] = {}

    @property
    def unwrapped(self):
        from megatron.core.utils import unwrap_model

        return unwrap_model([self.model])[0]

    @torch.no_grad()
    def forward(self, batch: dict, positions: Tensor | None = None, cache=None) -> Tensor | None:
        """Losses or logits of one micro-batch (see DenseConnectorModel.forward) on the last stage, None elsewhere.

        Every rank of the model calls it together. Under sequence parallelism S must be a multiple of the
        tensor-parallel size. cache: of ``new_cache``; the batch stands behind what it holds.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        moved = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in batch.items()}

        def forward_step(iterator, model):
            where = positions if positions is None else positions.to(self.device)
            output = model(moved, positions=where, cache=cache)
            return output, lambda output, non_loss_data=True: output

        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=batch["input_ids"].shape[1],
            micro_batch_size=batch["input_ids"].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if cache is not None:
            cache.sequence_len_offset += batch["input_ids"].shape[1]
            cache.enable_decode_mode()
        return collected[0] if collected else None

    def new_cache(self, rows: int, length: int):
        """Room for keys and values of ``rows`` rows of up to ``length`` positions; None where none are kept."""
        if not self.keeps_keys:
            return None
        from megatron.core.inference.contexts.static_context import StaticInferenceContext

        return StaticInferenceContext(rows, length)

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """``tensor`` as the last pipeline stage has it, on all stages; shapes agree everywhere."""
        from megatron.core import parallel_state

        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
        return tensor

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags`` (integers) as the largest that any rank of this model has, on all of them; shapes agree."""
        from megatron.core import parallel_state

        torch.distributed.all_reduce(
            flags, torch.distributed.ReduceOp.MAX, group=parallel_state.get_model_parallel_group()
        )
        return flags

    def image_loader(self, backend: str) -> ImageLoader:
        """The loader of ``--image-backend``, made once: its threads and decoders serve one question after another."""
        if backend not in self._loaders:
            resolved = self.resolved
            self._loaders[backend] = image_loader(
                backend, resolved.vision, resolved.image_aspect_ratio, resolved.tiling
            )
        return self._loaders[backend]


class Session(Runner):
    """The model of ``resolved`` on this rank, in evaluation mode. Starts the process groups."""

    keeps_keys = True

    def __init__(self, resolved: Resolved, seed: int = 1234):
        device.limit_cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        patches.apply()
        source = resolved.source
        check_world(source, int(os.environ.get("WORLD_SIZE", "1")))
        parallel.start(source.tensor_model_parallel_size, source.pipeline_model_parallel_size, seed=seed)
        super().__init__(resolved, _build(resolved, seed))


def _build(resolved: Resolved, seed: int):
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    from dc_megatron.inference import assemble
    from dc_megatron.model.language_model import Layout, transformer_config

    source = resolved.source
    engine = installed.usable_transformer_engine()
    layout = Layout(
        source.tensor_model_parallel_size,
        source.pipeline_model_parallel_size,
        params_dtype=torch.bfloat16 if source.bf16 else torch.float32,
        transformer_engine=engine,
    )
    rows = padded_vocab_size(resolved.language.vocab_size, source.tensor_model_parallel_size)
    config = transformer_config(resolved.language, layout)
    model = assemble.build_model(
        resolved.language,
        resolved.vision,
        resolved.connector,
        config,
        vocab_rows=rows,
        max_sequence_length=resolved.language.max_position_embeddings,
        transformer_engine=engine,
        seed=seed,
        tiling=resolved.tiling,
        lora=resolved.lora,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    assemble.load_vision_tower(model, resolved.vision, resolved.connector)
    if source.projector:
        refuse_other_tower(source.projector, resolved.vision.path)
        type_named = bool(source.dense_connector_type)
        newline = "required" if resolved.tiling.has_newline else "none"
        assemble.load_projector(model, source.projector, resolved.vision, resolved.connector, type_named, newline)
    if resolved.iteration_folder:
        # A projector beside a checkpoint: the checkpoint is a language model that was imported alone.
        model.connector_is_given = model.newline_is_given = bool(source.projector) and model.connector is not None
        assemble.load_checkpoint(model, resolved.iteration_folder)
    if resolved.lora or not resolved.iteration_folder:
        assemble.load_language_model(model, resolved.language, rows)
    model = model.to(device.device())
    return (Float16Module(config, model) if source.bf16 else model).eval()
