"""What is refused before a model is asked."""

from types import SimpleNamespace

import pytest

from dc_megatron.data.image_store import FolderStore
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.errors import UserError
from dc_megatron.inference.generate import continue_prompts
from tests.helpers.data_files import picture, sentencepiece_tokenizer, tiling


def test_prompts_with_ids_beyond_the_vocabulary_are_refused(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_tokenizer(tmp_path), "v1")

    class Asked(Exception):
        """The model was reached."""

    def unwrapped(_):
        raise Asked

    def ask(vocab_size):
        resolved = SimpleNamespace(language=SimpleNamespace(vocab_size=vocab_size), version="v1", tiling=tiling())
        runner = type("Runner", (), {"unwrapped": property(unwrapped)})()
        runner.resolved = resolved
        prompts = [([1, 5], [False] * 2), ([1, 300], [False] * 2)]
        continue_prompts(runner, tokenizer, prompts, [picture()], [FolderStore("")], 4)

    with pytest.raises(UserError, match=rf"a question: .*{tmp_path} makes token id 300 .*vocab_size 300.*resize"):
        ask(300)
    with pytest.raises(Asked):
        ask(301)
