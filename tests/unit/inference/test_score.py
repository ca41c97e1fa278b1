"""What scoring asks of the data room."""

from types import SimpleNamespace

import pytest

from dc_megatron.inference import score
from dc_megatron.inference.source import Source
from tests.helpers.data_files import tiling


def test_the_data_is_checked_against_the_models_vocabulary(monkeypatch):
    resolved = SimpleNamespace(
        language=SimpleNamespace(vocab_size=1003),
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=None,
        tiling=tiling(),
    )

    class Asked(Exception):
        """Carries the settings that the index is asked for with."""

    def build_or_wait(config, *_):
        raise Asked(config)

    monkeypatch.setattr(score, "resolve", lambda _: resolved)
    monkeypatch.setattr(score, "build_or_wait", build_or_wait)
    with pytest.raises(Asked) as asked:
        score.score_file(Source(model_name_or_path="model"), "data.json", "images")
    assert asked.value.args[0].vocab_size == 1003
    assert asked.value.args[0].tokenizer_path == "model"
