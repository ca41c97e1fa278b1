"""The oracle itself: its layers against the original's numbers, its losses against plain Hugging Face calls."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, Dinov2Model, SiglipVisionModel

from dc_megatron.config import CONNECTOR_TYPES, ConnectorConfig, VisionConfig, image_tokens
from dc_megatron.reference.model import ReferenceModel, dense_features
from tests.helpers.reference_batches import make_batch
from tests.helpers.tiny_models import VISION_MAKERS, tiny_clip, tiny_llama

CLIP_L = VisionConfig("clip", 8, 16, 24, 2, 336, 14, "gelu", 1e-5, (0.5,) * 3, (0.5,) * 3)
SIGLIP_SO400M = VisionConfig("siglip", 8, 16, 27, 2, 384, 14, "gelu", 1e-5, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_clip(root / "clip"), tiny_llama(root / "llama", layers=2)


@pytest.fixture(scope="module")
def model(folders):
    torch.manual_seed(0)
    vision = VisionConfig.from_folder(folders[0])
    return ReferenceModel(*folders, vision, ConnectorConfig("dci"))


def fake_states(vision, positions):
    generator = torch.Generator().manual_seed(3)
    count = vision.num_hidden_layers + 1
    return tuple(torch.randn(2, positions, vision.hidden_size, generator=generator) for _ in range(count))


def pool(x):
    """AvgPool1d(8, 8) over tokens, written out."""
    whole = x.shape[1] // 8 * 8
    return x[:, :whole].reshape(x.shape[0], whole // 8, 8, x.shape[2]).mean(2)


def mean(states, first, last):
    return sum(states[i] for i in range(first, last + 1)) / (last + 1 - first)


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        ("none", 576, lambda s: s[23]),
        ("sti", 720, lambda s: torch.cat([s[23], pool(s[7]), pool(s[15])], 1)),
        ("sci", 576, lambda s: torch.cat([s[23], s[7], s[15]], 2)),
        ("dci", 576, lambda s: torch.cat([s[23], mean(s, 0, 11), mean(s, 12, 23)], 2)),
    ],
)
def test_clip_l_features_use_the_layers_of_the_original(kind, tokens, expected):
    states = fake_states(CLIP_L, 577)
    features = dense_features(states, CLIP_L, ConnectorConfig(kind))
    without_cls = [s[:, 1:] for s in states]
    torch.testing.assert_close(features, expected(without_cls), atol=1e-6, rtol=0)
    assert features.shape[1] == tokens == image_tokens(CLIP_L, ConnectorConfig(kind))


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        ("none", 729, lambda s: s[26]),
        ("sti", 911, lambda s: torch.cat([s[26], pool(s[7]), pool(s[15])], 1)),
        ("sci", 729, lambda s: torch.cat([s[26], s[7], s[15]], 2)),
        ("dci", 729, lambda s: torch.cat([s[26], mean(s, 0, 12), mean(s, 13, 25)], 2)),
    ],
)
def test_siglip_so400m_features_use_the_layers_of_the_original(kind, tokens, expected):
    states = fake_states(SIGLIP_SO400M, 729)
    features = dense_features(states, SIGLIP_SO400M, ConnectorConfig(kind))
    torch.testing.assert_close(features, expected(states), atol=1e-6, rtol=0)
    assert features.shape[1] == tokens == image_tokens(SIGLIP_SO400M, ConnectorConfig(kind))


@pytest.mark.parametrize("kind", CONNECTOR_TYPES)
@pytest.mark.parametrize("tower", VISION_MAKERS)
def test_connector_features_follow_the_hugging_face_tower(tower, kind, tmp_path, folders):
    folder = VISION_MAKERS[tower](tmp_path / "tower")
    vision, connector = VisionConfig.from_folder(folder), ConnectorConfig(kind)
    reference = ReferenceModel(folder, folders[1], vision, connector)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    # The layers one after the other: no trust in what transformers calls a hidden state.
    classes = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}
    tower_model = classes[vision.family].from_pretrained(folder).eval()
    dinov2 = vision.family == "dinov2"
    with torch.no_grad():
        states = tower_model.embeddings(pixels)
        if vision.family == "clip":
            states = tower_model.pre_layrnorm(states)
        collected = [states]
        for layer in tower_model.encoder.layer if dinov2 else tower_model.encoder.layers:
            states = layer(states) if dinov2 else layer(states, None)
            collected.append(states)
        expected = reference.connector.mlp(dense_features(tuple(collected), vision, connector))
        features = reference.connector_features(pixels)
    assert features.shape == (2, image_tokens(vision, connector), 64)
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=0)


def test_text_only_loss_is_that_of_hugging_face(model, folders):
    ids = torch.arange(5, 17)
    batch = make_batch([[("text", ids.tolist())]], 12, tokens_per_image=16)
    plain = AutoModelForCausalLM.from_pretrained(folders[1])
    expected = plain(ids[None], labels=ids[None]).loss
    output = model(batch)
    assert output.supervised_tokens == 11
    torch.testing.assert_close(output.loss_sum / 11, expected, atol=1e-6, rtol=0)


def test_image_features_stand_where_the_mask_says(model):
    batch = make_batch([[("text", [5, 6]), ("image", 0), ("text", [7, 8, 9])]], 24, tokens_per_image=16)
    output = model(batch)
    words = model.language_model.get_input_embeddings()
    row = torch.cat(
        [
            words(torch.tensor([5, 6])),
            model.connector_features(batch["pixel_values"])[0],
            words(torch.tensor([7, 8, 9])),
        ]
    )
    logits = model.language_model(inputs_embeds=row[None]).logits[0]
    torch.testing.assert_close(output.logits[0, :21], logits, atol=2e-5, rtol=0)
    # 5 -> 6, the last image position -> 7, 7 -> 8, 8 -> 9.
    predicted = logits.log_softmax(-1)[[0, 17, 18, 19], [6, 7, 8, 9]]
    assert output.supervised_tokens == 4
    torch.testing.assert_close(output.loss_sum, -predicted.sum(), atol=2e-5, rtol=0)


def test_packed_rows_equal_samples_alone(model):
    first = [("text", [5, 6]), ("image", 0), ("text", [7, 8])]
    second = [("text", [9, 10, 11])]
    third = [("image", 1), ("text", [12, 13])]
    packed = model(make_batch([[first, second], [third]], 28, tokens_per_image=16, packed=True))
    alone = [model(make_batch([sample], 28, tokens_per_image=16)) for sample in (first, second, third)]
    assert packed.supervised_tokens == sum(a.supervised_tokens for a in alone)
    torch.testing.assert_close(packed.loss_sum, sum(a.loss_sum for a in alone), atol=5e-5, rtol=0)


def test_a_truncated_image_keeps_the_features_of_the_next_one_in_place(model):
    """The first row cuts its image after 10 of 16 positions; the second row's image must start at feature row 16."""
    cut = [("text", [5, 6]), ("image", 0)]
    whole = [("image", 1), ("text", [7, 8])]
    both = model(make_batch([cut, whole], 18, tokens_per_image=16, lengths=[12, 18]))
    alone = model(make_batch([whole], 18, tokens_per_image=16))
    torch.testing.assert_close(both.logits[1], alone.logits[0], atol=2e-5, rtol=0)
