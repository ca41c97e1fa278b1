"""Which layers of the tower the connector reads, and how many positions a picture takes."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config.choices import CONNECTOR_TYPES, PROJECTOR_TYPES, one_of
from dc_megatron.config.vision import VisionConfig
from dc_megatron.errors import UserError

# STI pools this many neighbouring tokens of a lower layer into one (AvgPool1d(8, 8), remainder dropped).
STI_POOL = 8

# (family, layers of the tower) -> the two lower layers of STI and SCI. Indices count HF hidden_states, 0 is the
# encoder's input. The first and fourth rows are the original's; the others sit at 1/3 and 2/3 of the depth likewise.
_SPARSE_LAYERS = {
    ("clip", 24): (7, 15),
    ("clip", 12): (3, 7),
    ("clip", 32): (10, 20),
    ("siglip", 27): (7, 15),
    ("siglip", 12): (3, 7),
    ("siglip", 24): (7, 15),
}


@dataclass(frozen=True)
class ConnectorConfig:
    """Which layers of the tower are fed to the language model, and the projector behind them."""

    dense_connector_type: str = "dci"
    projector_type: str = "mlp2x_gelu"
    # Index into hidden_states of the final feature; SigLIP ignores it, as the original does.
    select_layer: int = -2

    def __post_init__(self):
        one_of(self.dense_connector_type, CONNECTOR_TYPES, "--mm_dense_connector_type")
        one_of(self.projector_type, PROJECTOR_TYPES, "--mm_projector_type")
        if type(self.select_layer) is not int:
            raise UserError(f"--mm_vision_select_layer {self.select_layer!r}: it must be a whole number, such as -2")

    def input_size(self, vision: VisionConfig) -> int:
        """Channels that enter the projector."""
        return vision.hidden_size * (3 if self.dense_connector_type in ("sci", "dci") else 1)


@dataclass(frozen=True)
class LayerTable:
    """Indices into HF ``hidden_states`` that a connector reads.

    ``final`` is the feature LLaVA would use; ``groups`` are the lower features in the connector's order, each the
    mean over its layers (one layer for STI and SCI).
    """

    final: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def deepest(self) -> int:
        """The highest index read: layers of the tower above it need not run."""
        return max([self.final, *(i for group in self.groups for i in group)])


def layer_table(vision: VisionConfig, connector: ConnectorConfig) -> LayerTable:
    """The layers of ``vision`` that ``connector`` reads.

    CLIP and most others: the final feature is hidden_states[select_layer]. SigLIP: the input of the last layer, without
    post-layernorm. DCI averages two halves of the layers below the last index.
    """
    depth = vision.num_hidden_layers
    if not vision.about.ends_early:
        final = connector.select_layer if connector.select_layer >= 0 else depth + 1 + connector.select_layer
        if not 0 <= final <= depth:
            raise UserError(
                f"--mm_vision_select_layer {connector.select_layer}: the tower has {depth} layers;"
                f" choose from {-depth - 1} to {depth}"
            )
        halves = (tuple(range(depth // 2)), tuple(range(depth // 2, depth)))
    else:
        final = depth - 1
        halves = (tuple(range((depth - 1) // 2)), tuple(range((depth - 1) // 2, depth - 1)))
    kind = connector.dense_connector_type
    if kind == "none":
        return LayerTable(final, ())
    if kind == "dci":
        if depth < 3:
            raise UserError(f"--mm_dense_connector_type dci: the tower has {depth} layers; it needs at least 3")
        return LayerTable(final, halves)
    low, high = _SPARSE_LAYERS.get((vision.family, depth), (depth // 3 - 1, 2 * depth // 3 - 1))
    if low < 0:
        raise UserError(f"--mm_dense_connector_type {kind}: the tower has {depth} layers; it needs at least 3")
    return LayerTable(final, ((low,), (high,)))


def image_tokens(vision: VisionConfig, connector: ConnectorConfig) -> int:
    """Positions of the language model's sequence that one picture takes."""
    tokens = vision.num_patches
    if connector.dense_connector_type == "sti":
        tokens += 2 * (vision.num_patches // STI_POOL)
    return tokens


def image_share(count: int, rank: int, size: int) -> range:
    """Which of the ``count`` images of a micro-batch rank ``rank`` of ``size`` encodes.

    With c = ceil(count / size): c from rank * c on; the last ranks may have fewer, or none.
    """
    width = -(-count // size)
    return range(min(count, rank * width), min(count, (rank + 1) * width))
