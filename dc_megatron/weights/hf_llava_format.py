"""Stock ``LlavaForConditionalGeneration`` and ``LlavaNextForConditionalGeneration`` folders, in and out.

They read a list of hidden states and concatenate them as channels in front of the projector. SCI is such a list. DCI
is one too, once the means over its layers are folded into the first linear layer: the block of channels of a mean of
n layers becomes n blocks, each 1/n of it. Their head has no bias: Phi's becomes part of the final norm and the head.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import torch

from dc_megatron.config import (
    STI_POOL,
    ConnectorConfig,
    LanguageConfig,
    VisionConfig,
    image_tokens,
    layer_table,
    part_of_config,
    read_json_file,
    refuse_quantised,
)
from dc_megatron.errors import UserError
from dc_megatron.weights.derived_tensors import ColumnBlocks, WithZeroRows
from dc_megatron.weights.export_plan import Export, dtype_name, json_bytes, portable_text_config
from dc_megatron.weights.folded_bias import FoldedHead
from dc_megatron.weights.language_tables import EMBEDDING, HEAD, HEAD_BIAS, PHI_FINAL_NORM
from dc_megatron.weights.model_parts import (
    NEWLINE,
    PROJECTOR,
    TOWER,
    ModelFolder,
    complete_tower,
    language_part,
    projector_part,
    refuse_lost_grid,
    tower_of,
    tower_part,
)
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.sti_modeling import ARCHITECTURE, CONFIGURATION, MODEL_TYPE, MODELING, MODELING_FILE
from dc_megatron.weights.tensor_reader import InMemory, Merged, Renamed, TensorReader
from dc_megatron.weights.tokenizer_ids import IMAGE_TOKEN, image_token_id, tokenizer_ids

_KINDS = {"llava": "hf-llava", MODEL_TYPE: "hf-llava", "llava_next": "hf-llava-next"}
HF_LLAVA_TYPES = tuple(_KINDS)

# transformers' own, where config.json has none.
_NEXT_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# The names of transformers 4 (`language_model.model.*`) and those in memory of 5 (`model.language_model.*`).
_LANGUAGE = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?!lm_head\.)(.+)")
_HEADS = ("language_model.lm_head.weight", "lm_head.weight")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(.+)")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(.+)")
_NEWLINES = ("image_newline", "model.image_newline")


def open_hf_llava(folder: str, config: dict, flag: str, vision_tower: str = "") -> ModelFolder:
    """``folder``, whose config.json is ``config``; the tower is inside, ``vision_tower`` may not be given.

    One feature layer is connector ``none``; the layers of SCI are ``sci``; the pooled ones of our own export are
    ``sti``. UserError as ``open_model``, and for layers that no connector reads.
    """
    what = f"{flag} {folder}"
    if vision_tower:
        raise UserError(f"--vision-tower {vision_tower}: {folder} has a tower of its own; leave the flag out")
    refuse_quantised(config, what)
    text = _text_config(config, what)
    language = LanguageConfig.from_config(text, what, folder)
    tower_config = {"model_type": "clip_vision_model", **part_of_config(config, "vision_config", what)}
    processor = _processor_config(folder, what)
    vision = VisionConfig.from_config(tower_config, what, processor)
    vision, connector = _connector(config, vision, what)
    checkpoint = open_checkpoint(folder, flag)
    names = _sorted_names(checkpoint.names(), what)
    parts: list[TensorReader] = [
        _language_part(checkpoint, names["language"], language, what),
        projector_part(checkpoint, names["projector"], vision, connector, language.hidden_size, what),
        _tower_part(checkpoint, names["tower"], vision, connector, what),
    ]
    if config["model_type"] == "llava_next":
        refuse_wrong_names(what, {NEWLINE} - names["newline"].keys(), [], "every llava_next model has it")
        refuse_wrong_shape(what, NEWLINE, checkpoint.shape(names["newline"][NEWLINE]), (language.hidden_size,))
        parts.append(Renamed(checkpoint, names["newline"]))
    elif names["newline"]:
        refuse_wrong_names(what, [], names["newline"].values(), "only llava_next models have it")
    grid = tuple((width, height) for height, width in stock_grid(config) or ()) or None
    return ModelFolder(
        kind=_KINDS[config["model_type"]],
        path=folder,
        language=language,
        reader=Merged(parts),
        config_folder=folder,
        language_config=text,
        vision=vision,
        connector=connector,
        tower_config={**tower_config, "num_hidden_layers": vision.num_hidden_layers},
        processor_config=processor,
        image_aspect_ratio="anyres" if grid else "pad" if (processor or {}).get("do_pad") else "square",
        image_grid_pinpoints=grid,
        mm_patch_merge_type="spatial_unpad" if grid else "flat",
        image_token_id=stock_image_token(config),
    )


def stock_image_token(config: dict) -> int:
    """The id of ``<image>``, by either spelling, else transformers' own."""
    return config.get("image_token_index", config.get("image_token_id", 32000))


def stock_grid(config: dict) -> list[list[int]] | None:
    """AnyRes: the resolutions as transformers writes them, (height, width); None for other models."""
    return (config.get("image_grid_pinpoints") or _NEXT_GRID) if config["model_type"] == "llava_next" else None


def _text_config(config: dict, what: str) -> dict:
    """The language model's configuration; values that equal the defaults of its class may be missing."""
    text = part_of_config(config, "text_config", what)
    tied = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return {"model_type": "llama", **text, "tie_word_embeddings": tied}


def _processor_config(folder: str, what: str) -> dict | None:
    """What the folder says of its pictures; transformers 5 keeps it inside processor_config.json."""
    if os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
        return read_json_file(folder, "preprocessor_config.json", what)
    if os.path.isfile(os.path.join(folder, "processor_config.json")):
        return read_json_file(folder, "processor_config.json", what).get("image_processor")
    return None


def _connector(config: dict, vision: VisionConfig, what: str) -> tuple[VisionConfig, ConnectorConfig]:
    """The connector that reads ``vision_feature_layer``, and ``vision`` with the depth at which it does."""
    if config.get("projector_hidden_act", "gelu") != "gelu" or not config.get("multimodal_projector_bias", True):
        raise UserError(f"{what}: projectors other than linear, gelu, linear with biases are not available")
    wanted = _strategy(vision)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != wanted:
        raise UserError(
            f"{what}: vision_feature_select_strategy '{strategy}' with a {vision.family} tower is not available;"
            f" '{wanted}' is (all patches and no class token)"
        )
    depth = vision.num_hidden_layers
    layers = config.get("vision_feature_layer", -2)
    single = type(layers) is int
    if not single and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise UserError(f"{what}: vision_feature_layer {layers!r} is neither a layer nor a list of layers")
    found = [layer if layer >= 0 else depth + 1 + layer for layer in ([layers] if single else layers)]
    if not found or not all(0 <= layer <= depth for layer in found):
        raise UserError(f"{what}: vision_feature_layer {layers} of a tower of {depth} layers")
    if vision.about.ends_early:
        # Our final feature is the input of the last layer: with another feature the tower ends elsewhere.
        vision = replace(vision, num_hidden_layers=found[0] + 1)
        select_layer = -2
    else:
        select_layer = layers if single else found[0] - depth - 1
    if single:
        kind = "sti" if config.get("dense_connector_layers") else "none"
        connector = ConnectorConfig(kind, select_layer=select_layer)
        if kind == "sti":
            table = layer_table(vision, connector)
            if [list(group) for group in table.groups] != [[layer] for layer in config["dense_connector_layers"]]:
                raise UserError(
                    f"{what}: dense_connector_layers {config['dense_connector_layers']} are not those of sti"
                )
        return vision, connector
    for kind in ("sci", "dci"):
        connector = ConnectorConfig(kind, select_layer=select_layer)
        if found == _folded_layers(vision, connector)[0]:
            if kind == "sci":
                return vision, connector
            raise UserError(
                f"{what}: vision_feature_layer {layers} is DCI with its means folded into the projector, which"
                " cannot be undone exactly; import what '--format llava' exported from the same checkpoint"
            )
    if len(found) == 1:
        return vision, ConnectorConfig("none", select_layer=select_layer)
    sci = _folded_layers(vision, ConnectorConfig("sci", select_layer=select_layer))[0]
    raise UserError(
        f"{what}: no connector reads the layers {layers} of this tower; available: one layer (none), {sci} (sci)"
    )


def _sorted_names(names: list[str], what: str) -> dict[str, dict[str, str]]:
    """Our names -> names on file, of each part of the model. What belongs to no part is refused."""
    found: dict[str, dict[str, str]] = {"language": {}, "projector": {}, "tower": {}, "newline": {}}
    twice, unknown = [], []
    for name in names:
        if name in _HEADS:
            part, own = "language", HEAD
        elif match := _LANGUAGE.fullmatch(name):
            part, own = "language", f"model.{match[1]}"
        elif match := _PROJECTOR.fullmatch(name):
            part, own = "projector", f"{PROJECTOR}{'0' if match[1] == '1' else '2'}.{match[2]}"
        elif match := _TOWER.fullmatch(name):
            part, own = "tower", match[1]
        elif name in _NEWLINES:
            part, own = "newline", NEWLINE
        else:
            unknown.append(name)
            continue
        if own in found[part]:
            twice.append(f"{found[part][own]} and {name}")
        found[part][own] = name
    if twice:
        raise UserError(f"{what}: the same weight under two names: {', '.join(twice[:4])}")
    refuse_wrong_names(what, [], unknown, "A Llava model has a language model, a projector and a tower")
    return found


def _language_part(
    checkpoint: TensorReader, names: dict[str, str], language: LanguageConfig, what: str
) -> TensorReader:
    """The language model; a head's bias, which these formats cannot hold, is zero."""
    if not language.linear_bias:
        return language_part(checkpoint, names, language, what)
    kind = checkpoint.dtype(names[HEAD]) if HEAD in names else torch.float32
    bias = InMemory({HEAD_BIAS: torch.zeros(language.vocab_size, dtype=kind)})
    return language_part(Merged([checkpoint, bias]), {**names, HEAD_BIAS: HEAD_BIAS}, language, what)


def _tower_part(
    checkpoint: TensorReader, names: dict[str, str], vision: VisionConfig, connector: ConnectorConfig, what: str
) -> TensorReader:
    """The tower without layers above the depth that ``vision`` has for us."""
    layer = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d+)\.")
    kept = {
        own: name
        for own, name in names.items()
        if not (match := layer.match(own)) or int(match[1]) < vision.num_hidden_layers
    }
    return tower_part(Renamed(checkpoint, kept), kept, vision, connector, what)


def hf_llava_export(
    model: ModelFolder,
    *,
    dtype: torch.dtype | None = None,
    modeling_code: bool = False,
    image_token: tuple[int, int] | None = None,
) -> Export:
    """``model`` for stock transformers: Llava, or LlavaNext for an AnyRes model.

    ``dtype`` is what the writer will cast to, None as stored. ``modeling_code`` allows STI, which stock Llava
    cannot say, with a file of Python code in the folder. The tokenizer's and the processor's files are the caller's,
    who then also chooses ``image_token``: (id of ``<image>``, rows of the embedding).
    UserError: a model without projector, STI without the flag.
    """
    if not model.has_projector:
        raise UserError("--format hf-llava: the model has no projector; --format hf writes the language model")
    if not model.vision.about.stock_llava:
        raise UserError(
            f"--format hf-llava: transformers' Llava was not tried with a {model.vision.family} tower; use --format"
            " llava"
        )
    refuse_lost_grid(model, "hf-llava")
    kind = model.connector.dense_connector_type
    if kind == "sti" and model.image_grid_pinpoints is not None:
        raise UserError("--format hf-llava: LlavaNext cannot append STI's pooled tokens; use --format llava")
    if model.image_grid_pinpoints is not None and model.mm_patch_merge_type != "spatial_unpad":
        raise UserError(
            f"--format hf-llava: {model.path} joins tiles by mm_patch_merge_type {model.mm_patch_merge_type}, LlavaNext"
            " by spatial_unpad alone; use --format llava"
        )
    if kind == "sti" and not modeling_code:
        raise UserError(
            "--format hf-llava: stock Llava cannot append the pooled tokens of an sti connector; --with-modeling-code"
            f" puts a short {MODELING_FILE} into the folder, which transformers runs with trust_remote_code=True;"
            " --format llava needs none; sci and dci models need none either"
        )
    tower, depth = complete_tower(tower_of(model), model.vision, model.connector)
    token, rows = image_token or _image_token(model)
    config = _config(model, depth, token, rows, dtype or model.dtype)
    tensors = Renamed(_tensors(model, tower, rows, dtype), _names(model, tower))
    files = {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes(_generation_config(model, token)),
    }
    if kind == "sti":
        files[MODELING_FILE] = MODELING.encode()
    return Export(tensors, files, {}, config, _notes(model, token), token)


def _folded_layers(vision: VisionConfig, connector: ConnectorConfig) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """The hidden states to concatenate, and for each the (block of our first linear layer, factor) it is made of.

    A layer that the connector reads in several places comes once, with the sum of its blocks.
    """
    table = layer_table(vision, connector)
    layers, blocks = [table.final], [[(0, 1.0)]]
    for number, group in enumerate(table.groups, start=1):
        for layer in group:
            if layer not in layers:
                layers.append(layer)
                blocks.append([])
            blocks[layers.index(layer)].append((number, 1.0 / len(group)))
    return layers, blocks


def _tensors(model: ModelFolder, tower: TensorReader, rows: int, dtype: torch.dtype | None) -> TensorReader:
    """Everything under our names, with the first linear layer folded and a row for the picture's token."""
    first = f"{PROJECTOR}0.weight"
    folded = model.connector.dense_connector_type in ("sci", "dci")
    head: list[TensorReader] = []
    if model.language.linear_bias:
        norm = [f"{PHI_FINAL_NORM}.{part}" for part in ("weight", "bias")]
        head = [FoldedHead(model.reader, [HEAD, HEAD_BIAS, *norm], dtype, f"--format hf-llava: {model.path}")]
    computed = {HEAD_BIAS, *([first] if folded else []), *(name for part in head for name in part.names())}
    own = [n for n in model.reader.names() if not n.startswith(TOWER) and n not in computed]
    parts: list[TensorReader] = [Renamed(model.reader, {name: name for name in own}), tower, *head]
    if folded:
        blocks = _folded_layers(model.vision, model.connector)[1]
        parts.append(ColumnBlocks(model.reader, first, first, model.vision.hidden_size, blocks, dtype))
    merged = Merged(parts)
    return WithZeroRows(merged, {name: rows for name in (EMBEDDING, HEAD) if name in merged.names()})


def _names(model: ModelFolder, tower: TensorReader) -> dict[str, str]:
    """Name on file -> our name. Code in the folder is loaded without transformers' renaming: names as in memory."""
    stock = model.connector.dense_connector_type != "sti"
    start = "" if stock else "model."
    text = "language_model.model." if stock else "model.language_model."
    linear = {"0": "linear_1", "2": "linear_2"}
    names = {}
    for name in dict.fromkeys([*model.reader.names(), *tower.names()]):
        if name == HEAD_BIAS:
            continue
        if name == HEAD:
            names["language_model.lm_head.weight" if stock else HEAD] = name
        elif name.startswith(PROJECTOR):
            number, part = name.removeprefix(PROJECTOR).split(".")
            names[f"{start}multi_modal_projector.{linear[number]}.{part}"] = name
        elif name.startswith(TOWER):
            if name in tower.names():
                names[f"{start}vision_tower.vision_model.{name.removeprefix(TOWER)}"] = name
        elif name == NEWLINE:
            # A model may have it from its family and not use it: Llava has no place for it.
            if model.image_grid_pinpoints is not None:
                names[NEWLINE] = name
        else:
            names[text + name.removeprefix("model.")] = name
    return names


def _image_token(model: ModelFolder) -> tuple[int, int]:
    """(the id of the picture's token, rows of the embedding that then are needed)."""
    token = model.image_token_id
    if token is None:
        token = image_token_id(tokenizer_ids(model.config_folder) or {}, model.language.vocab_size)
    return token, max(model.language.vocab_size, token + 1)


def _config(model: ModelFolder, depth: int, image_token: int, rows: int, dtype: torch.dtype) -> dict:
    vision, connector, kind = model.vision, model.connector, model.connector.dense_connector_type
    text = {**portable_text_config(model.language_config, dtype), "vocab_size": rows}
    anyres = model.image_grid_pinpoints is not None
    layers: int | list[int] = _folded_layers(vision, connector)[0]
    if kind in ("none", "sti"):
        # From the end, as the published models say it.
        layers = layer_table(vision, connector).final - depth - 1
    config = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "ignore_index": -100,
        "image_token_index": image_token,
        "image_seq_length": image_tokens(vision, connector),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": model.language.tie_word_embeddings,
        "torch_dtype": dtype_name(dtype),
        "vision_config": _vision_config(model, depth),
        "vision_feature_layer": layers,
        "vision_feature_select_strategy": _strategy(vision),
    }
    if anyres:
        # transformers reads (height, width).
        config["image_grid_pinpoints"] = [[height, width] for width, height in model.image_grid_pinpoints]
    if kind == "sti":
        module = MODELING_FILE.removesuffix(".py")
        config |= {
            "architectures": [ARCHITECTURE],
            "auto_map": {
                "AutoConfig": f"{module}.{CONFIGURATION}",
                "AutoModelForImageTextToText": f"{module}.{ARCHITECTURE}",
            },
            "model_type": MODEL_TYPE,
            "dense_connector_layers": [layer for group in layer_table(vision, connector).groups for layer in group],
            "dense_connector_pool": STI_POOL,
        }
    return config


def _strategy(vision: VisionConfig) -> str:
    """``default`` leaves the token in front of the patches out, ``full`` takes all."""
    return "default" if vision.num_prefix_tokens else "full"


def _vision_config(model: ModelFolder, depth: int) -> dict:
    config = {"model_type": model.vision.about.model_type, **model.vision.hugging_face_values(depth)}
    if model.vision.family == "clip":
        return {**config, "projection_dim": (model.tower_config or {}).get("projection_dim", 512)}
    return config


def _generation_config(model: ModelFolder, image_token: int) -> dict:
    """The source's special ids, and that the picture's token is never chosen: its head row is zero or untrained."""
    source = dict(model.language_config)
    if os.path.isfile(os.path.join(model.config_folder, "generation_config.json")):
        source |= read_json_file(model.config_folder, "generation_config.json", "the source's generation settings")
    ids = {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if source.get(key) is not None}
    return {**ids, "suppress_tokens": [image_token]}


def _notes(model: ModelFolder, image_token: int) -> list[str]:
    notes = [
        f"'{IMAGE_TOKEN}' is token {image_token}; generation_config.json keeps it from being chosen, and a server that"
        " does not read suppress_tokens from there has to be told"
    ]
    if model.image_aspect_ratio == "square" and model.vision.about.crops:
        notes.append("trained on square crops (image_aspect_ratio square): the processor must crop and not pad")
    if model.language.linear_bias:
        notes.append(f"{HEAD_BIAS} became part of {HEAD} and of the final norm, which stock Llava's head has none for")
    if model.connector.dense_connector_type == "sti":
        notes.append(f"{MODELING_FILE} is code: transformers 5 runs it with trust_remote_code=True")
    return notes
