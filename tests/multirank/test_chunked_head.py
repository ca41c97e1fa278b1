"""The head in chunks on real ranks: the same loss and gradients as with all logits at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from tests.helpers.reference_batches import make_batch
from tests.helpers.tiny_models import tiny_clip, tiny_llama
from tests.multirank import parity
from tests.multirank.job import Job

TRAIN = "tests.multirank.parity_worker:train"
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence_parallel": True},
}
# Rows of a chunk of a shard of 512 ids, half of the padded vocabulary.
CHUNK = 5


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Packed rows with the last id of an odd vocabulary among their targets; the second shard has the padding."""
    root = tmp_path_factory.mktemp("models")
    language, tower = tiny_llama(root / "llama", vocab=1003, layers=2), tiny_clip(root / "clip")
    vision, connector = VisionConfig.from_folder(tower), ConnectorConfig("dci")
    rows = [parity.make_rows(counts, seed) for seed, counts in enumerate([[1, 0, 2], [0, 1]])]
    return Job(
        language_folder=language,
        vision_folder=tower,
        micro_batches=[[make_batch([row], 2 * parity.SEQUENCE, tokens_per_image=16, packed=True) for row in rows]],
        connector_state=parity.connector_state(vision, connector, LanguageConfig.from_folder(language).hidden_size),
        packed=True,
    )


@pytest.mark.parametrize("trainable", ["connector", "connector,llm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_change_neither_loss_nor_gradients(workers, job, layout, trainable):
    job = replace(job, trainable=trainable, **LAYOUTS[layout])
    world = job.tensor
    whole = workers.run(TRAIN, world, job)
    chunked = replace(job, chunk_bytes=4 * 512 * CHUNK)
    parts = workers.run(TRAIN, world, chunked)
    targets = [batch["counts"]["supervised_tokens"] for batch in job.micro_batches[0]]
    assert min(targets) > 2 * CHUNK
    for rank in range(world):
        assert whole[rank]["chunked_rows"] == []
        assert parts[rank]["chunked_rows"] == targets
    assert abs(parity.losses(parts)[0] - parity.losses(whole)[0]) <= parity.LOSS_TOLERANCE
    gradients = parity.merge(job, whole, "gradients")
    assert any(name.startswith("model.") for name in gradients) is ("llm" in trainable)
    worst, name = parity.worst_difference(parity.merge(chunked, parts, "gradients"), gradients)
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


def test_chunks_against_the_reference(workers, job):
    job = replace(job, chunk_bytes=4 * 512 * CHUNK, tensor=2, sequence_parallel=True)
    results, reference = workers.run(TRAIN, 2, job), parity.run_reference(job)
    assert all(result["chunked_rows"] for result in results)
    assert abs(parity.losses(results)[0] - reference["losses"][0]) <= parity.LOSS_TOLERANCE
    worst, name = parity.worst_difference(parity.merge(job, results, "gradients"), reference["gradients"])
    assert worst <= parity.GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"
