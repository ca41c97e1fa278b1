"""What parity tests share: batches, the reference's run, and the comparison with what the ranks hand back."""

from __future__ import annotations

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, image_tokens, padded_vocab_size
from dc_megatron.reference.model import ReferenceModel
from dc_megatron.reference.train import Recipe, train
from dc_megatron.weights.language_tables import find_rule, language_table
from dc_megatron.weights.lora_table import adapter_shapes
from dc_megatron.weights.rules import to_hugging_face
from tests.helpers.peft_reference import add_peft_adapters
from tests.helpers.reference_batches import make_batch
from tests.multirank.job import Job

# fp32 sums of some hundred terms in another order: one part in 10^7 each, with two orders of room.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
# Twenty Adam steps amplify the rounding of tiny gradients, whose sign is the step.
CURVE_TOLERANCE = 2e-5
DELTA_TOLERANCE = 2e-3
SEQUENCE = 128


def make_rows(image_counts: list[int], seed: int, vocabulary: int = 1003) -> list:
    """Samples with the given numbers of images in between stretches of text; the last id of the vocabulary occurs."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, count in enumerate(image_counts):
        sample = []
        for image in range(count):
            sample.append(("text", torch.randint(3, vocabulary, (3,), generator=generator).tolist()))
            sample.append(("image", seed * 100 + number * 10 + image))
        sample.append(("text", [*torch.randint(3, vocabulary, (12,), generator=generator).tolist(), vocabulary - 1]))
        rows.append(sample)
    return rows


def make_step(counts: list[list[int]], vision: VisionConfig, connector: ConnectorConfig, seed: int = 0) -> list[dict]:
    """The micro-batches of one global batch; ``counts`` gives the images of every row of every micro-batch."""
    tokens = image_tokens(vision, connector)
    return [
        make_batch(
            make_rows(rows, seed * 1000 + number),
            SEQUENCE,
            tokens_per_image=tokens,
            image_size=vision.image_size,
        )
        for number, rows in enumerate(counts)
    ]


def connector_state(
    vision: VisionConfig, connector: ConnectorConfig, width: int, newline: bool = False
) -> dict[str, torch.Tensor]:
    """Projector weights, and an ``image_newline``, that are neither implementation's default."""
    generator = torch.Generator().manual_seed(11)
    size = connector.input_size(vision)
    shapes = {
        "mlp.0.weight": (width, size),
        "mlp.0.bias": (width,),
        "mlp.2.weight": (width, width),
        "mlp.2.bias": (width,),
        **({"image_newline": (width,)} if newline else {}),
    }
    return {name: torch.randn(*shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def make_job(
    folders: dict[str, str],
    language="llama",
    tower="clip",
    connector="dci",
    counts=((1, 3), (2, 0)),
    steps=1,
    **settings,
) -> Job:
    """A run on models of ``folders``; ``counts``: images of the rows of the micro-batches of every step, all alike."""
    vision, settings_connector = VisionConfig.from_folder(folders[tower]), ConnectorConfig(connector)
    width = LanguageConfig.from_folder(folders[language]).hidden_size
    batches = make_step([list(rows) for rows in counts], vision, settings_connector)
    return Job(
        language_folder=folders[language],
        vision_folder=folders[tower],
        micro_batches=[batches] * steps,
        connector_type=connector,
        connector_state=connector_state(vision, settings_connector, width),
        **settings,
    )


def assert_first_step_equal(job: Job, results: list[dict], reference: dict) -> None:
    """Loss and gradients of the first step, within the tolerances above."""
    difference = abs(losses(results)[0] - reference["losses"][0])
    assert difference <= LOSS_TOLERANCE, f"loss differs by {difference}"
    worst, name = worst_difference(merge(job, results, "gradients"), reference["gradients"])
    assert worst <= GRADIENT_TOLERANCE, f"gradient of {name} differs by {worst:.2e}"


def run_reference(job: Job) -> dict:
    """Losses by step, first-step gradients, start and end parameters of ``job`` in plain Hugging Face / PyTorch."""
    vision = VisionConfig.from_folder(job.vision_folder)
    connector = ConnectorConfig(job.connector_type)
    model = ReferenceModel(job.vision_folder, job.language_folder, vision, connector, tiling=job.tiling)
    if job.lora is not None:
        add_peft_adapters(model, job.lora, job.lora_state)
    state = dict(job.connector_state)
    if model.image_newline is not None:
        model.image_newline.data.copy_(state.pop("image_newline"))
    model.connector.load_state_dict(state)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    starts = {"connector": ("connector.", "image_newline"), "vision_tower": ("vision_tower.",)}
    recipe = Recipe(
        learning_rate=job.lr,
        rates={start: rate for part, rate in job.rates.items() for start in starts[part]},
        weight_decay=job.weight_decay,
        trainable=job.trainable,
    )
    steps = train(model, job.micro_batches, recipe, [job.lr * share for share in job.shares] or None)
    return {
        "losses": [step.loss for step in steps],
        "gradients": {_plain(name): grad for name, grad in steps[0].grads.items()},
        "start": {_plain(name): value for name, value in start.items()},
        "parameters": {_plain(name): value.detach() for name, value in model.named_parameters()},
    }


def _plain(name: str) -> str:
    """The reference's parameter names as the language model's own, ``connector.*`` or ``lora.*``."""
    name = name.removeprefix("language_model.")
    return name.replace("base_model.model.", "lora.").replace(".default.", ".") if ".lora_" in name else name


def merge(job: Job, results: list[dict], what: str) -> dict[str, torch.Tensor]:
    """Full tensors under Hugging Face names from the shards that the ranks returned."""
    language = LanguageConfig.from_folder(job.language_folder)
    table = language_table(language, padded_vocab_size(language.vocab_size, job.tensor))
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        if result["data_rank"] == 0:
            for name, value in result[what].items():
                shards.setdefault(name, {})[result["tensor_rank"]] = value
    full = {}
    for name, by_rank in shards.items():
        ordered = [by_rank[rank] for rank in range(job.tensor)]
        if name.startswith(("connector.", "image_newline", "vision_tower.")):
            for other in ordered[1:]:
                assert torch.equal(ordered[0], other), f"{name} differs between tensor-parallel ranks"
            full[name] = ordered[0]
        elif name.startswith("lora."):
            shape = adapter_shapes(language, job.lora.r)[name.removeprefix("lora.")]
            full[name] = _whole_factor(name, ordered, shape)
        else:
            rule, layer = find_rule(table, name)
            full.update(to_hugging_face(rule, layer, ordered))
    return full


def _whole_factor(name: str, ordered: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """A factor from the ranks' parts: pieces of it, or the whole of it on each of them."""
    if tuple(ordered[0].shape) == shape:
        for other in ordered[1:]:
            assert torch.equal(ordered[0], other), f"{name} differs between tensor-parallel ranks"
        return ordered[0]
    return torch.cat(ordered, dim=0 if ordered[0].shape[1] == shape[1] else 1)


def worst_difference(ours: dict, reference: dict, floor: float = 1e-9) -> tuple[float, str]:
    """Largest ||a - b|| / max(||b||, floor) over the reference's tensors, and its name. Every tensor must be there."""
    missing = [name for name in reference if name not in ours]
    assert not missing, f"no rank returned {missing}"
    worst = (0.0, "")
    for name, expected in reference.items():
        difference = (ours[name].double() - expected.double()).norm() / max(expected.double().norm(), floor)
        worst = max(worst, (float(difference), name))
    return worst


def losses(results: list[dict]) -> list[float]:
    """The losses as the last pipeline stage saw them, the same on all of its ranks."""
    seen = [result["losses"] for result in results if result["losses"][0] is not None]
    for other in seen[1:]:
        assert other == seen[0], "ranks disagree about the loss"
    return seen[0]
