"""A rank's model built in its shape and filled from Hugging Face folders: where model and weights meet."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from dc_megatron.config import ConnectorConfig, ImageTiling, LanguageConfig, LoraConfig, VisionConfig, layer_table
from dc_megatron.model.dense_connector import DenseConnector, initial_newline
from dc_megatron.model.language_model import build_language_model
from dc_megatron.model.multimodal_model import NEWLINE, DenseConnectorModel
from dc_megatron.model.vision_tower import VisionTower
from dc_megatron.weights.language_loading import LanguageWeights
from dc_megatron.weights.lora_table import adapted_linears
from dc_megatron.weights.peft_files import PeftFactors
from dc_megatron.weights.projector_files import read_projector
from dc_megatron.weights.torch_dist_tree import TorchDistTree, check_tree
from dc_megatron.weights.tree_tables import TOWER_KEY
from dc_megatron.weights.vision_tables import vision_state_dict


def build_model(
    language: LanguageConfig,
    vision: VisionConfig,
    connector: ConnectorConfig,
    config: TransformerConfig,
    *,
    vocab_rows: int,
    max_sequence_length: int,
    transformer_engine: bool,
    seed: int,
    tiling: ImageTiling | None = None,
    lora: LoraConfig | None = None,
    packed: bool = False,
    tower_on_all_stages: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> DenseConnectorModel:
    """This rank's part of the model in fp32 and random weights; tower and connector only where ``pre_process``.

    tiling: says whether there is an image_newline; None: there is none. tower_on_all_stages: the tower is in the first
    chunk of every pipeline stage. lora: adapters, beside all linears of the layers.
    """
    table = layer_table(vision, connector)
    has_tower = pre_process or (tower_on_all_stages and not vp_stage)
    has_newline = pre_process and tiling is not None and tiling.has_newline
    model = DenseConnectorModel(
        build_language_model(
            language,
            config,
            vocab_rows=vocab_rows,
            max_sequence_length=max_sequence_length,
            transformer_engine=transformer_engine,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        ),
        vocab_size=language.vocab_size,
        dense_connector_type=connector.dense_connector_type,
        layer_table=table,
        vision_tower=VisionTower(vision, table) if has_tower else None,
        connector=DenseConnector(vision, connector, language.hidden_size, seed) if pre_process else None,
        image_newline=initial_newline(language.hidden_size, seed) if has_newline else None,
        packed=packed,
    )
    if lora is not None:
        model.add_adapters(adapted_linears(language), lora, seed)
    return model


def load_vision_tower(model: DenseConnectorModel, vision: VisionConfig, connector: ConnectorConfig) -> None:
    """Fill the tower from its folder; nothing to do where there is none."""
    if model.vision_tower is not None:
        model.vision_tower.load(vision_state_dict(vision.path, vision, connector))


def load_projector(
    model: DenseConnectorModel,
    path: str,
    vision: VisionConfig,
    connector: ConnectorConfig,
    type_named: bool = True,
    newline: str = "none",
) -> None:
    """Fill the connector from ``path`` (a projector file or its folder). Every rank reads it, so all refuse alike.

    newline: see ``read_projector``; under "optional" an image_newline that the file does not have stays as it is.
    """
    width = model.config.hidden_size
    state, _ = read_projector(path, connector, vision, width, newline=newline, type_named=type_named)
    vector = state.pop(NEWLINE, None)
    if model.connector is not None:
        model.connector.load_state_dict(state)
        if vector is not None:
            with torch.no_grad():
                model.image_newline.copy_(vector)


@torch.no_grad()
def load_language_model(model: DenseConnectorModel, language: LanguageConfig, vocab_rows: int) -> None:
    """Fill this rank's shards straight from the Hugging Face folder of ``language``."""
    group = model.pg_collection.tp
    weights = LanguageWeights(language.path, language, group.rank(), group.size(), vocab_rows)
    for name, parameter in model.language_model.named_parameters():
        source = global_name(model, name)
        shard = weights.shard(source)
        assert shard.shape == parameter.shape, f"{source}: shard {tuple(shard.shape)}, model {tuple(parameter.shape)}"
        parameter.copy_(shard)


def load_adapters(model: DenseConnectorModel, path: str, language: LanguageConfig, lora: LoraConfig) -> None:
    """Fill this rank's adapters from PEFT's folder ``path``. Every rank opens it, so all refuse alike."""
    model.lora.fill(PeftFactors(path, language, lora).read)


def global_name(model: DenseConnectorModel, name: str) -> str:
    """The name of a language-model parameter with its layer counted over all pipeline stages."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local, rest = name[len(prefix) :].split(".", 1)
    return f"{prefix}{model.language_model.decoder.layers[int(local)].layer_number - 1}.{rest}"


def load_checkpoint(model: DenseConnectorModel, folder: str) -> None:
    """Fill the model from one iteration's ``torch_dist`` folder, written at whatever layout."""
    from megatron.core import dist_checkpointing

    check_tree(folder)
    model.tower_is_stored = holds_tower(folder)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(state["model"])


def holds_tower(folder: str, flag: str = "--load") -> bool:
    """Whether one iteration's ``torch_dist`` folder holds a vision tower, which was trained then."""
    return TorchDistTree(folder, flag).has(TOWER_KEY)
