"""What a dry run compares: the weights table and the planner's numbers with the model that was built."""

from __future__ import annotations

from dc_megatron.config import LanguageConfig
from dc_megatron.errors import UserError
from dc_megatron.inference.assemble import global_name
from dc_megatron.model.multimodal_model import DenseConnectorModel
from dc_megatron.planner.gradient_buffers import Sharding, rank_buffers
from dc_megatron.planner.parameter_count import Model, rank_parameters
from dc_megatron.training.dry_rank import RankCount
from dc_megatron.training.run import Checked
from dc_megatron.weights.language_tables import find_rule, hugging_face_shapes, language_table
from dc_megatron.weights.rules import shard_shape
from dc_megatron.weights.vision_tables import vision_shapes


class WeightsTable:
    """Follows which Hugging Face tensors the parameters of the ranks that were built are read from."""

    def __init__(self, language: LanguageConfig, vocab_rows: int, tensor: int):
        self._table = language_table(language, vocab_rows)
        self._tensor = tensor
        self.expected = set(hugging_face_shapes(self._table, language.num_hidden_layers))
        self._seen: set[str] = set()
        # Layers of stages that are like one that was built.
        self._layer_names: set[str] = set()

    def follow(self, model: DenseConnectorModel) -> None:
        """Every parameter has a row, of its shape; AssertionError otherwise."""
        for name, parameter in model.language_model.named_parameters():
            rule, layer = find_rule(self._table, global_name(model, name))
            expected = shard_shape(rule, self._tensor)
            assert tuple(parameter.shape) == expected, f"{name}: the model has {tuple(parameter.shape)}, not {expected}"
            names = rule.source_shapes(layer)
            self._seen.update(names)
            if layer is not None:
                self._layer_names.update(rule.source_shapes(0))

    def unread(self) -> set[str]:
        """Tensors of the folder that no rank would read. A layer that was not built is like those that were."""
        layers = {name.split(".layers.0.", 1)[1] for name in self._layer_names}
        return {name for name in self.expected - self._seen if _in_layer(name) not in layers}


def _in_layer(name: str) -> str:
    """``self_attn.q_proj.weight`` of a tensor of any layer; the name itself where it is of none."""
    return name.split(".layers.", 1)[1].split(".", 1)[1] if ".layers." in name else name


def refuse_tower_of_other_names(model: DenseConnectorModel, checked: Checked) -> int:
    """Number of the tower's tensors, each of which the table has in its shape; AssertionError otherwise."""
    known = vision_shapes(checked.vision)
    own = {name: tuple(value.shape) for name, value in model.vision_tower.model.state_dict().items()}
    wrong = sorted(name for name, shape in own.items() if known.get(name) != shape and "position_ids" not in name)
    assert not wrong, f"the vision tower's {wrong[:4]} are not in the weights table in their shapes"
    return len(own)


def refuse_another_count(
    model: Model, tensor: int, stages: tuple[tuple[int, ...], ...], sharding: Sharding, count: RankCount
) -> None:
    """AssertionError where the planner's arithmetic and the model differ in a single number."""
    parameters = rank_parameters(model, tensor, stages, count.stage)
    buffers = rank_buffers(model, tensor, stages, count.stage, sharding)
    planned = {
        "layers": stages[count.stage],
        "parameters": sum(one.elements for one in parameters),
        "trainable": sum(one.elements for one in parameters if one.learns),
        "buffers": sum(buffer.numbers for buffer in buffers),
        "updates": sum(buffer.owned[count.data_rank] for buffer in buffers),
    }
    for name, value in planned.items():
        built = getattr(count, name)
        assert built == value, f"rank {count.rank}: {name}: planned {value}, built {built}"


def refuse_unfit_data(checked: Checked) -> None:
    """UserError for lengths that the model was not made for; what is left is known from the flags' own checks."""
    settings, most = checked.settings, checked.language.max_position_embeddings
    if settings.model_max_length > most:
        raise UserError(
            f"--model_max_length {settings.model_max_length}: {checked.language.path} was trained on up to {most}"
            f" positions (max_position_embeddings); use at most {most}"
        )
