"""Tokenizer, processor and chat template of an exported model: where the weights' side and the data's side meet."""

from __future__ import annotations

from dc_megatron.config import image_tokens
from dc_megatron.data import hf_processor
from dc_megatron.errors import UserError
from dc_megatron.weights.export_plan import Export
from dc_megatron.weights.language_tables import EMBEDDING
from dc_megatron.weights.model_parts import ModelFolder


class ExportedProcessor:
    """What ``exporter.export_checkpoint`` asks for hf-llava. ``version``: the template, where the model names none."""

    def __init__(self, version: str = ""):
        self._version = version

    def image_token(self, model: ModelFolder) -> tuple[int, int]:
        """(id of ``<image>``, rows that the embedding must have for it)."""
        chosen = hf_processor.image_token(model.config_folder, model.language.vocab_size)
        return chosen.token_id, chosen.rows

    def write(self, model: ModelFolder, export: Export, folder: str) -> None:
        """Write the files into ``folder``. UserError: no template known, or one that the files cannot say."""
        version = self._version or model.version
        if not version:
            raise UserError(
                f"--version: {model.path} does not say which conversation template it was trained with; name it, such"
                " as --version v1"
            )
        if self._version and model.version and self._version != model.version:
            raise UserError(f"--version {self._version}: {model.path} was trained with {model.version}")
        hf_processor.write_processor(
            folder,
            tokenizer_folder=model.config_folder,
            vision=model.vision,
            tokens_per_image=image_tokens(model.vision, model.connector),
            version=version,
            image_aspect_ratio=model.image_aspect_ratio or "pad",
            image_token_id=export.image_token_id,
            vocab_rows=export.tensors.shape(_embedding_of(export))[0],
            model_max_length=model.model_max_length or model.language.max_position_embeddings,
            next=export.config.get("image_grid_pinpoints"),
        )


def _embedding_of(export: Export) -> str:
    """The embedding under the name that the export gives it."""
    return next(name for name in export.tensors.names() if name.endswith(EMBEDDING.removeprefix("model.")))
