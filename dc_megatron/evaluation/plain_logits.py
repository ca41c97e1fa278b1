"""Logits by transformers: text models and stock Llava as it loads them, LLaVA's folders over the plain connector.

Everything in fp32 and without TF32, attention written out, on the GPU where there is one. No code of a folder is run.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dc_megatron.config import VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.evaluation.logit_inputs import LogitInput
from dc_megatron.reference.model import ReferenceConnector, dense_features
from dc_megatron.runtime import device
from dc_megatron.weights.model_parts import PROJECTOR, TOWER, ModelFolder, complete_tower, tower_of
from dc_megatron.weights.tensor_reader import TensorReader, read_tensor

_FP32 = {"dtype": torch.float32, "attn_implementation": "eager"}


def of_text_model(folder: str, what: str, inputs: list[LogitInput], columns: int) -> list[Tensor]:
    """fp32 [places, columns] of every input, by AutoModelForCausalLM. UserError: weights that are not in the folder."""
    from transformers import AutoModelForCausalLM

    def run(model: nn.Module, given: LogitInput) -> Tensor:
        return model(input_ids=given.ids, use_cache=False).logits

    return _run(_from_pretrained(AutoModelForCausalLM, folder, what), run, inputs, columns)


def of_stock_llava(folder: str, what: str, inputs: list[LogitInput], columns: int) -> list[Tensor]:
    """The same by AutoModelForImageTextToText."""
    from transformers import AutoModelForImageTextToText

    def run(model: nn.Module, given: LogitInput) -> Tensor:
        pictures = {} if given.pixel_values is None else {"pixel_values": given.pixel_values}
        ids = given.ids.masked_fill(given.image_mask, image_token(model.config))
        return model(input_ids=ids, use_cache=False, **pictures).logits

    return _run(_from_pretrained(AutoModelForImageTextToText, folder, what), run, inputs, columns)


def image_token(config) -> int:
    """The id that stands for a position of a picture; transformers 5 calls it ``image_token_id``."""
    found = getattr(config, "image_token_id", None)
    return config.image_token_index if found is None else found


def of_llava(model: ModelFolder, inputs: list[LogitInput], columns: int) -> list[Tensor]:
    """The same of a LLaVA / DenseConnector folder, as ``reference`` computes it."""
    with_picture = any(given.pixel_values is not None for given in inputs)
    return _run(_PlainLlava(model, with_picture), _PlainLlava.__call__, inputs, columns)


class _PlainLlava(nn.Module):
    """Tower, connector and language model of ``folder``; the first two only ``with_picture``."""

    def __init__(self, folder: ModelFolder, with_picture: bool):
        super().__init__()
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self.settings = folder.vision, folder.connector
        config = CONFIG_MAPPING[folder.language.model_type].from_dict(folder.language_config)
        with _without_initialisation():
            self.language_model = AutoModelForCausalLM.from_config(config, **_FP32)
        self.language_model.tie_weights()
        _fill(self.language_model, folder.reader)
        if with_picture:
            tower, layers = complete_tower(tower_of(folder), folder.vision, folder.connector)
            self.vision_tower = _tower(folder.vision, layers)
            _fill(self.vision_tower, tower, TOWER)
            width = folder.language.hidden_size
            self.connector = ReferenceConnector(folder.connector.input_size(folder.vision), width)
            _fill(self.connector.mlp, folder.reader, PROJECTOR)

    def forward(self, given: LogitInput) -> Tensor:
        """fp32 [b, s, vocabulary]."""
        embeddings = self.language_model.get_input_embeddings()(given.ids)
        if given.pixel_values is not None:
            states = self.vision_tower(given.pixel_values, output_hidden_states=True).hidden_states
            features = self.connector(dense_features(states, *self.settings))
            embeddings = embeddings.masked_scatter(given.image_mask[..., None], features)
        return self.language_model(inputs_embeds=embeddings, use_cache=False).logits


def _tower(vision: VisionConfig, layers: int) -> nn.Module:
    import transformers

    config = getattr(transformers, vision.about.config_class)(**vision.hugging_face_values(layers))
    with _without_initialisation():
        return getattr(transformers, vision.about.model_class)._from_config(config, **_FP32)


def _without_initialisation():
    from transformers.initialization import no_init_weights

    return no_init_weights()


@torch.no_grad()
def _fill(module: nn.Module, reader: TensorReader, prefix: str = "") -> None:
    """Every parameter from ``reader``, cast to fp32. Tied ones come once."""
    for name, parameter in module.named_parameters():
        parameter.copy_(read_tensor(reader, prefix + name.removeprefix("vision_model.")))


def _from_pretrained(auto_class, folder: str, what: str) -> nn.Module:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **_FP32
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    # What transformers does not find it makes up.
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind])
    if wrong:
        raise UserError(f"{what}: transformers finds no weights, or of another shape, for {', '.join(wrong[:4])}")
    return model


@torch.no_grad()
def _run(model: nn.Module, run, inputs: list[LogitInput], columns: int) -> list[Tensor]:
    """Logits of every input at the places of its words. The model is gone afterwards."""
    place = device.device()
    model = model.eval().to(place)
    with exact_products():
        logits = [run(model, given.to(place)).flatten(0, 1) for given in inputs]
    found = [
        rows[given.word_places.to(place), :columns].float().cpu() for rows, given in zip(logits, inputs, strict=True)
    ]
    del model, logits
    gc.collect()
    if device.has_cuda():
        torch.cuda.empty_cache()
    return found


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products as fp32 on a GPU: cuDNN's convolutions would use TF32 unless told."""
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [getattr(holder, name) for holder, name in switches]
    for holder, name in switches:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for (holder, name), value in zip(switches, before, strict=True):
            setattr(holder, name, value)
