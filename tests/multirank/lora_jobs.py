"""Training runs with adapters, for the tests that compare them with PEFT and that save them."""

from __future__ import annotations

from pathlib import Path

from dc_megatron.config import ConnectorConfig, LanguageConfig, LoraConfig, VisionConfig
from tests.helpers.peft_reference import factors
from tests.helpers.tiny_models import tiny_clip, tiny_llama, tiny_phi, tiny_qwen2
from tests.multirank import parity
from tests.multirank.job import Job

LORA = LoraConfig(r=4, alpha=8)


def make_folders(root: Path) -> dict[str, str]:
    """Models to adapt, by name, and a tower."""
    return {
        "llama": tiny_llama(root / "llama", vocab=1003),
        "qwen2": tiny_qwen2(root / "qwen2", vocab_size=1003, num_hidden_layers=2),
        "phi": tiny_phi(root / "phi", vocab_size=1003, num_hidden_layers=2),
        "clip": tiny_clip(root / "clip"),
    }


def make_job(folders: dict[str, str], language: str = "llama", steps: int = 1, **settings) -> Job:
    """A run that starts from factors of which none is zero; ``settings`` as fields of Job."""
    vision, connector = VisionConfig.from_folder(folders["clip"]), ConnectorConfig("dci")
    width = LanguageConfig.from_folder(folders[language]).hidden_size
    return Job(
        language_folder=folders[language],
        vision_folder=folders["clip"],
        micro_batches=[parity.make_step([[1, 3], [2, 0]], vision, connector)] * steps,
        connector_state=parity.connector_state(vision, connector, width),
        trainable="connector,lora",
        lora=LORA,
        lora_state=factors(folders[language], LORA.r),
        **settings,
    )
