"""The model as Megatron's engine asks for it: one chunk of one rank, filled from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable

from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor

from dc_megatron.inference.assemble import (
    build_model,
    holds_tower,
    load_adapters,
    load_language_model,
    load_projector,
    load_vision_tower,
)
from dc_megatron.model.multimodal_model import NEWLINE, DenseConnectorModel
from dc_megatron.training.run import Checked
from dc_megatron.training.shared_output import refuse_unshared_output
from dc_megatron.weights.torch_dist_tree import TorchDistTree


def make_model_provider(checked: Checked) -> Callable:
    """``model_provider(pre_process, post_process, ...)`` of ``megatron.training.pretrain``.

    Where a checkpoint will be loaded, the language model is not read from its folder first, unless the checkpoint holds
    no more than adapters to it. A projector file given
    beside another run's weights counts for the connector.
    """
    settings = checked.settings

    def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
        args = get_args()
        if args.save and args.world_size > 1 and not vp_stage:
            refuse_unshared_output(args.save)
        model = build_model(
            checked.language,
            checked.vision,
            checked.connector,
            config or core_transformer_config_from_args(args),
            vocab_rows=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            transformer_engine=args.transformer_impl == "transformer_engine",
            seed=args.seed,
            tiling=checked.tiling,
            lora=checked.lora,
            packed=settings.packing != "none",
            tower_on_all_stages=settings.vision_tower_stages == "all",
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        load_vision_tower(model, checked.vision, checked.connector)
        if not checked.start.loads or checked.lora:
            load_language_model(model, checked.language, args.padded_vocab_size)
        if settings.lora_weight_path and not checked.start.loads:
            load_adapters(model, settings.lora_weight_path, checked.language, checked.lora)
        if settings.pretrain_mm_mlp_adapter and not checked.start.resumes:
            load_projector(
                model,
                settings.pretrain_mm_mlp_adapter,
                checked.vision,
                checked.connector,
                checked.names_connector_type,
                newline="optional" if checked.tiling.has_newline else "none",
            )
            model.connector_is_given = model.newline_is_given = checked.start.loads and model.connector is not None
        elif checked.start.loads and not checked.start.resumes and model.connector is not None:
            # A language model that was imported alone has no connector, a model without AnyRes no image_newline: they
            # stay as they were initialised.
            tree = TorchDistTree(checked.start.tree, "--load")
            model.connector_is_given = not tree.has("connector.mlp.0.weight")
            model.newline_is_given = not tree.has(NEWLINE)
        if checked.start.loads:
            # A tower that an earlier run has trained goes on in all that follow, whether it learns there or not.
            model.tower_is_stored = holds_tower(checked.start.tree)
            model.tower_is_given = not model.tower_is_stored
        model.set_trainable(set(settings.trainable), recompute_tower=settings.recomputes_tower)
        return model

    return model_provider


def trained_connector(model_chunks: list[DenseConnectorModel]) -> dict[str, Tensor] | None:
    """The connector's tensors, image_newline among them, on the rank that has it, if it was trained; else None."""
    model = model_chunks[0]
    if model.connector is None or not next(model.connector.parameters()).requires_grad:
        return None
    if model.whole_connector is not None:
        return model.whole_connector
    newline = {} if model.image_newline is None else {NEWLINE: model.image_newline}
    return {**model.connector.state_dict(), **newline}
