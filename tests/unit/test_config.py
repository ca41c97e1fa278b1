"""Shapes read from config.json, the connectors' layers, and what is refused with which words."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import transformers
from transformers import LlamaConfig, MistralConfig, PhiConfig, Qwen2Config, Qwen3Config

from dc_megatron.config import (
    TOWERS,
    ConnectorConfig,
    DataConfig,
    DataSource,
    ImageTiling,
    LanguageConfig,
    VisionConfig,
    check_parallel_layout,
    image_share,
    image_tokens,
    layer_table,
    nearest,
)
from dc_megatron.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1003,
}


def write_config(folder, config, name="config.json"):
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


def tower(family, depth, image_size=336):
    return VisionConfig(family, 1024, 4096, depth, 16, image_size, 14, "gelu", 1e-5, (0.5,) * 3, (0.5,) * 3)


def test_layers_of_the_original():
    """Typed from the original: CLIP-L with 24 layers and SigLIP-so400m with 27."""
    clip, siglip = tower("clip", 24), tower("siglip", 27, 384)
    for kind, groups in {
        "none": (),
        "sti": ((7,), (15,)),
        "sci": ((7,), (15,)),
        "dci": (tuple(range(12)), tuple(range(12, 24))),
    }.items():
        table = layer_table(clip, ConnectorConfig(kind))
        assert (table.final, table.groups, table.deepest) == (23, groups, 23)
    for kind, groups in {
        "none": (),
        "sti": ((7,), (15,)),
        "sci": ((7,), (15,)),
        "dci": (tuple(range(13)), tuple(range(13, 26))),
    }.items():
        table = layer_table(siglip, ConnectorConfig(kind, select_layer=-5))
        assert (table.final, table.groups, table.deepest) == (26, groups, 26)


@pytest.mark.parametrize(("family", "depth"), [("clip", 3), ("clip", 6), ("clip", 12), ("siglip", 3), ("siglip", 12)])
@pytest.mark.parametrize("kind", ["sti", "sci", "dci"])
def test_other_depths_stay_inside_the_tower(family, depth, kind):
    table = layer_table(tower(family, depth), ConnectorConfig(kind))
    layers = [layer for group in table.groups for layer in group]
    assert layers == sorted(set(layers))
    assert min(layers) >= 0
    assert table.deepest <= depth
    assert len(table.groups) == 2


@pytest.mark.parametrize("kind", ["sti", "sci", "dci"])
def test_a_tower_too_shallow_is_refused(kind):
    with pytest.raises(UserError, match=rf"--mm_dense_connector_type {kind}: the tower has 2 layers"):
        layer_table(tower("siglip", 2), ConnectorConfig(kind))


def test_select_layer_counts_from_either_end_and_stays_inside():
    clip = tower("clip", 24)
    assert layer_table(clip, ConnectorConfig("none", select_layer=-1)).final == 24
    assert layer_table(clip, ConnectorConfig("none", select_layer=-25)).final == 0
    assert layer_table(clip, ConnectorConfig("none", select_layer=11)).final == 11
    for outside in (-26, 25):
        with pytest.raises(UserError, match=rf"--mm_vision_select_layer {outside}: .* from -25 to 24"):
            layer_table(clip, ConnectorConfig("none", select_layer=outside))


@pytest.mark.parametrize(
    ("vision", "kind", "tokens", "width"),
    [
        (tower("clip", 24), "none", 576, 1024),
        (tower("clip", 24), "sti", 720, 1024),
        (tower("clip", 24), "sci", 576, 3072),
        (tower("clip", 24), "dci", 576, 3072),
        (tower("siglip", 27, 384), "sti", 911, 1024),
        (tower("siglip", 27, 384), "dci", 729, 3072),
    ],
)
def test_positions_and_channels_of_a_picture(vision, kind, tokens, width):
    assert image_tokens(vision, ConnectorConfig(kind)) == tokens
    assert ConnectorConfig(kind).input_size(vision) == width


def test_unknown_connector_names_the_nearest():
    with pytest.raises(
        UserError, match=r"--mm_dense_connector_type dcii: unknown \(did you mean 'dci'\?\); one of: sti"
    ):
        ConnectorConfig("dcii")
    with pytest.raises(UserError, match="--mm_projector_type linear"):
        ConnectorConfig("dci", projector_type="linear")
    assert nearest("zzzzzz", ["dci"]) == ""


def test_tower_from_a_vision_model(tmp_path):
    folder = write_config(
        tmp_path,
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
    )
    vision = VisionConfig.from_folder(folder)
    assert (vision.family, vision.hidden_size, vision.num_patches, vision.num_prefix_tokens) == ("clip", 1024, 576, 1)
    # What config.json leaves out is the default of transformers.
    assert vision.num_attention_heads == 12
    assert vision.pad_color == (122, 116, 104)


def test_tower_inside_a_full_model_and_its_processor(tmp_path):
    config = {"model_type": "siglip", "vision_config": {"hidden_size": 1152, "image_size": 384, "patch_size": 14}}
    folder = write_config(tmp_path, config)
    assert VisionConfig.from_folder(folder).pad_color == (127, 127, 127)
    write_config(tmp_path, {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, "preprocessor_config.json")
    vision = VisionConfig.from_folder(folder)
    assert (vision.family, vision.hidden_size, vision.num_prefix_tokens) == ("siglip", 1152, 0)
    assert vision.pad_color == (25, 51, 76)


def test_the_folder_of_a_tower_is_judged_by_its_config(tmp_path):
    folder = tmp_path / "clip-vit-large"
    folder.mkdir()
    write_config(folder, {"model_type": "vit_mae"})
    with pytest.raises(
        UserError, match=r"--vision_tower .*model_type 'vit_mae'.*give a folder of one of: clip \(clip_"
    ):
        VisionConfig.from_folder(str(folder))


def test_siglip_2_of_a_fixed_resolution_is_a_siglip():
    """As published: SigLIP's model_type around the shape of the tower, a text model of another vocabulary."""
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 512,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 16,
        },
    }
    vision = VisionConfig.from_config(config, "config")
    assert (vision.family, vision.num_patches, vision.num_prefix_tokens) == ("siglip", 1024, 0)
    assert layer_table(vision, ConnectorConfig("sci")).groups == ((7,), (15,))
    for model_type in ("siglip2", "siglip2_vision_model"):
        with pytest.raises(UserError, match=r"variable resolution \(NaFlex\), which is not available"):
            VisionConfig.from_config({**config, "model_type": model_type}, "config")


@pytest.mark.parametrize("family", TOWERS)
def test_every_family_is_what_transformers_says_of_it(family):
    """Defaults, names and classes of a row against the classes of transformers."""
    row = TOWERS[family]
    config = getattr(transformers, row.config_class)()
    assert config.model_type == row.model_type
    assert {name: getattr(config, name) for name in row.defaults} == dict(row.defaults)
    vision = VisionConfig.from_config({"model_type": row.model_type}, "config")
    again = type(config)(**vision.hugging_face_values(vision.num_hidden_layers))
    assert {name: getattr(again, name) for name in row.defaults} == dict(row.defaults)
    assert getattr(transformers, row.model_class).config_class is type(config)


@pytest.mark.parametrize(("entry", "value"), [("use_swiglu_ffn", True), ("qkv_bias", False), ("mlp_ratio", 2.5)])
def test_a_dinov2_of_another_form_is_refused(entry, value):
    with pytest.raises(UserError, match=f"config: .*{entry}"):
        VisionConfig.from_config({"model_type": "dinov2", entry: value}, "config")


def test_language_model_with_defaults(tmp_path):
    language = LanguageConfig.from_folder(write_config(tmp_path, LLAMA))
    assert (language.head_dim, language.rope_theta, language.rope_scaling_factor) == (8, 10000.0, None)
    assert not language.tie_word_embeddings
    assert language.path == str(tmp_path)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("given", [{}, {"num_attention_heads": 16, "hidden_size": 2048}], ids=["nothing", "some"])
def test_what_a_configuration_leaves_out_is_the_default_of_transformers(config_class, given):
    """A configuration inside another, as in LLaVA folders, says only what differs."""
    language = LanguageConfig.from_config({"model_type": config_class.model_type, **given}, "config")
    expected = config_class(**given).to_dict()
    names = [f.name for f in fields(LanguageConfig) if f.name in expected and f.name != "head_dim"]
    assert {name: getattr(language, name) for name in names} == {name: expected[name] for name in names}
    assert "sliding_window" in names or config_class is LlamaConfig
    assert language.head_dim == 128
    assert language.rope_theta == expected["rope_parameters"]["rope_theta"]


def test_phi_in_the_spellings_of_both_transformers():
    """transformers 4 writes the rotated share beside the rope, 5 into it; what is left out is the class's default."""
    published = {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "partial_rotary_factor": 0.4}
    for config in (published, PhiConfig(**published).to_dict()):
        language = LanguageConfig.from_config(config, "config")
        assert (language.rotary_percent, language.head_dim, language.num_key_value_heads) == (0.4, 80, 32)
        assert (language.rms_norm_eps, language.rope_theta, language.intermediate_size) == (1e-5, 1e4, 8192)
        assert language.parallel_layers
    theirs, ours = PhiConfig(), LanguageConfig.from_config({"model_type": "phi"}, "config")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rotary_percent == theirs.rope_parameters["partial_rotary_factor"]


QWEN2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 2, "rope_theta": 1e6}


def test_qwen2_has_biases_and_a_window_that_is_not_used():
    language = LanguageConfig.from_config({**QWEN2, "use_sliding_window": False}, "config")
    assert language.qkv_bias
    assert (language.sliding_window, language.rope_theta, language.head_dim) == (None, 1e6, 8)
    assert not LanguageConfig.from_config(LLAMA, "config").qkv_bias


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"max_window_layers": 2}, 4096),
        ({"max_window_layers": 4}, None),
        ({"layer_types": ["full_attention"] * 4}, None),
        ({"max_window_layers": 4, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, 4096),
    ],
    ids=["upper layers", "no layer", "types without", "types with"],
)
def test_a_window_counts_where_a_layer_of_qwen2_uses_it(change, window):
    language = LanguageConfig.from_config({**QWEN2, "use_sliding_window": True, **change}, "config")
    assert language.sliding_window == window
    theirs = Qwen2Config(**{**QWEN2, "use_sliding_window": True, **change})
    assert ("sliding_attention" in theirs.layer_types) == (window is not None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1}},
    ],
)
def test_llama3_scaling_in_both_spellings(rope, tmp_path):
    language = LanguageConfig.from_folder(write_config(tmp_path, {**LLAMA, **rope}))
    assert (language.rope_theta, language.rope_scaling_factor) == (5e5, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "model_type 'phi3'; available: llama .*, mistral, qwen2 .*, qwen3 and phi"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only silu is available with model_type llama"),
        ({"model_type": "phi", "hidden_act": "gelu"}, "hidden_act 'gelu'; only gelu_new and gelu_pytorch_tanh"),
        ({"model_type": "phi", "hidden_act": "gelu_new", "qk_layernorm": True}, "qk_layernorm true"),
        ({"model_type": "phi", "hidden_act": "gelu_new", "tie_word_embeddings": True}, "tie_word_embeddings true"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias true"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2}}, "low_freq_factor 2"),
        ({"model_type": ["llama"]}, r"model_type '\['llama'\]'; available"),
        ({"num_hidden_layers": None}, "num_hidden_layers None; it must be a whole number"),
        ({"num_attention_heads": "8"}, "num_attention_heads '8'; it must be"),
        ({"hidden_size": -64}, "hidden_size -64; it must be"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]; it must be an object"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\); give the model in bf16"),
    ],
)
def test_language_models_that_cannot_be_trained_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=f"--model_name_or_path .*{message}"):
        LanguageConfig.from_folder(write_config(tmp_path, {**LLAMA, **change}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": ["clip"]}, "no vision tower known"),
        ({"model_type": "clip_vision_model", "patch_size": 0}, "patch_size 0; it must be a whole number"),
        ({"model_type": "clip", "vision_config": 3}, "vision_config 3; it must be an object"),
    ],
)
def test_towers_without_a_shape_are_refused(config, message):
    with pytest.raises(UserError, match=f"tower: .*{message}"):
        VisionConfig.from_config(config, "tower")


def test_a_layer_is_a_whole_number():
    with pytest.raises(UserError, match="--mm_vision_select_layer '-2': it must be a whole number"):
        ConnectorConfig("dci", select_layer="-2")


def test_folders_that_hold_no_configuration(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*absent"):
        LanguageConfig.from_folder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no config\.json; give a Hugging Face model folder"):
        LanguageConfig.from_folder(str(tmp_path))
    with pytest.raises(UserError, match="is not valid JSON"):
        LanguageConfig.from_folder(write_config(tmp_path, "{"))
    with pytest.raises(UserError, match="holds a list, not an object"):
        LanguageConfig.from_folder(write_config(tmp_path, "[]"))


def test_layouts_that_do_not_divide_name_those_that_do(tmp_path):
    language = LanguageConfig.from_folder(write_config(tmp_path, LLAMA))
    check_parallel_layout(language, 4, 2)
    with pytest.raises(UserError, match=r"tensor-model-parallel-size 8: .*values that do: 1, 2, 4$"):
        check_parallel_layout(language, 8, 1)
    with pytest.raises(UserError, match=r"pipeline-model-parallel-size 3: does not divide 4 layers; .*: 1, 2, 4; or"):
        check_parallel_layout(language, 1, 3)
    check_parallel_layout(language, 1, 3, uneven_split=True)


def test_a_layout_names_the_size_that_it_does_not_divide(tmp_path):
    narrow = LanguageConfig.from_folder(write_config(tmp_path, LLAMA | {"intermediate_size": 90}))
    with pytest.raises(UserError) as said:
        check_parallel_layout(narrow, 4, 1)
    assert "does not divide 90 channels of intermediate_size of" in str(said.value)
    assert "heads" not in str(said.value)
    assert str(said.value).endswith("values that do: 1, 2")
    with pytest.raises(UserError, match="3: does not divide 8 attention heads and 4 key-value heads of"):
        check_parallel_layout(narrow, 3, 1)


@pytest.mark.parametrize(
    ("count", "size", "shares"),
    [
        (7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        (5, 4, [[0, 1], [2, 3], [4], []]),
        (1, 3, [[0], [], []]),
        (0, 2, [[], []]),
        (4, 1, [[0, 1, 2, 3]]),
    ],
)
def test_shares_of_images_follow_each_other(count, size, shares):
    assert [list(image_share(count, rank, size)) for rank in range(size)] == shares


def data_config(**values):
    given = {"version": "v1", "image_aspect_ratio": "pad", "model_max_length": 64, "seq_length": 64}
    sources = (DataSource("a.json", "images"), DataSource("b.json", "images", 0.5))
    return DataConfig(sources, "tokenizer", tiling=ImageTiling(28, 4, 2), **{**given, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": "v2"}, "--version v2: unknown"),
        ({"image_aspect_ratio": "any"}, "--image_aspect_ratio any: unknown"),
        ({"order": "sorted"}, "--data-order sorted: unknown"),
        ({"image_backend": "cv2"}, "--image-backend cv2: unknown"),
        ({"packing": "first-fit"}, r"--packing first-fit: unknown \(did you mean 'best-fit'"),
        ({"image_decode_device": "cuda"}, "--image-decode-device cuda: unknown"),
        ({"model_max_length": 65}, "--model_max_length 65: longer than --seq-length 64"),
    ],
)
def test_data_settings_are_checked(values, message):
    assert (data_config().data_path, data_config().image_folder) == ("a.json b.json", "images")
    with pytest.raises(UserError, match=message):
        data_config(**values)


def test_configuration_needs_no_torch():
    code = "import sys, dc_megatron, dc_megatron.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
