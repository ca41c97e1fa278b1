"""The names and shapes of the frozen vision towers, and their tensors from any folder that contains one.

In memory transformers 5 names them without a level ``vision_model``; folders carry it, or the levels of a larger model.
"""

from __future__ import annotations

import re

from torch import Tensor

from dc_megatron.config import ConnectorConfig, VisionConfig, layer_table
from dc_megatron.errors import UserError
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.safetensors_files import Checkpoint, open_checkpoint
from dc_megatron.weights.tensor_reader import TensorReader

# Levels in front of the tower's own names, as LLaVA, transformers and older transformers write them.
_PREFIX = re.compile(r"^(model\.)?(vision_tower\.){0,2}(vision_model\.)?")

# What a folder may hold beside the tower, left out on purpose: a buffer of older transformers, the text half and the
# projections of a full CLIP or SigLIP, and SigLIP's pooling head.
_DROPPED = re.compile(
    r"(.*\.)?embeddings\.position_ids|text_model\..*|logit_scale|logit_bias|(text|visual)_projection\.weight"
    r"|(.*\.)?head\..*"
)


def vision_state_dict(
    folder: str, vision: VisionConfig, connector: ConnectorConfig | None = None, flag: str = "--vision_tower"
) -> dict[str, Tensor]:
    """The tower's tensors, keyed as the ``.state_dict()`` of its class in transformers 5.17.

    Layers that ``connector`` reads must be there; layers above them and the norm behind them are returned where the
    folder has them. Without ``connector`` every layer must be, save SigLIP's last, which no connector reads. The
    pooling head of SigLIP is never returned. dtype as on file, in memory of their own. UserError: names missing or left
    over, shapes other than those of ``vision``.
    """
    checkpoint, names = open_vision_tower(folder, vision, connector, flag)
    return {key: checkpoint.read(name) for key, name in names.items()}


def open_vision_tower(
    folder: str, vision: VisionConfig, connector: ConnectorConfig | None = None, flag: str = "--vision_tower"
) -> tuple[Checkpoint, dict[str, str]]:
    """The folder, and the name in it for each key of ``vision_state_dict``. Checks as that does, reads no tensor."""
    checkpoint = open_checkpoint(folder, flag)
    return checkpoint, tower_names(checkpoint, checkpoint.names(), vision, connector, f"{flag} {folder}")


def tower_names(
    reader: TensorReader, names: list[str], vision: VisionConfig, connector: ConnectorConfig | None, what: str
) -> dict[str, str]:
    """The tower's own key -> name in ``reader``, for those of ``names`` that are of a tower.

    What must be there is said at ``vision_state_dict``; UserError that begins with ``what`` where it is not so.
    """
    found = {}
    for name in names:
        if not _DROPPED.fullmatch(name):
            key = _PREFIX.sub("", name)
            if key in found:
                raise UserError(f"{what}: {found[key]} and {name} are the same weight of the tower; give one tower")
            found[key] = name
    known = vision_shapes(vision)
    required = _required(vision, connector, known)
    refuse_wrong_names(
        what,
        required - found.keys(),
        [name for key, name in found.items() if key not in known],
        "config.json and weights are of different towers, or the folder is incomplete",
    )
    for key, name in found.items():
        refuse_wrong_shape(what, name, reader.shape(name), known[key])
    return found


def vision_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the tower, without SigLIP's pooling head."""
    family, sizes = vision.about, vision.dimensions
    shapes = dict(family.outer)
    for layer in range(vision.num_hidden_layers):
        shapes |= {f"{family.blocks}.{layer}.{name}": shape for name, shape in family.block.items()}
    return {name: tuple(sizes.get(size, size) for size in shape) for name, shape in shapes.items()}


def _required(vision: VisionConfig, connector: ConnectorConfig | None, known: dict) -> set[str]:
    """Names that must be there; hidden_states[i] needs the first i layers."""
    family = vision.about
    depth = vision.num_hidden_layers - family.ends_early
    if connector is not None:
        depth = layer_table(vision, connector).deepest
    layers = re.compile(rf"{re.escape(family.blocks)}\.(\d+)\.")
    required = set()
    for name in known:
        match = layers.match(name)
        if name not in family.optional and (match is None or int(match[1]) < depth):
            required.add(name)
    return required
