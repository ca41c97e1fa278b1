"""What ranks do for the tests of the model's parts: attention, loss head, shared images, configuration, loading."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig
from dc_megatron.inference.assemble import build_model
from dc_megatron.model.attention import TorchCoreAttention
from dc_megatron.model.language_model import Layout, transformer_config
from dc_megatron.model.loss_head import mask_padded_columns
from dc_megatron.runtime import parallel
from tests.helpers.language_shapes import LLAMA
from tests.multirank.job import Job
from tests.multirank.parity_worker import build

HEADS, HEAD_SIZE = 8, 16


def _attention() -> TorchCoreAttention:
    return TorchCoreAttention(transformer_config(LLAMA, Layout()), 1, None, None).eval()


def _bounds(bounds: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=int(bounds.diff().max()))


def _eager(query, key, value, scale: float) -> torch.Tensor:
    """Causal softmax attention as the formula: [s, heads, d] and [s, groups, d] -> [s, heads * d]."""
    length, heads, groups = query.shape[0], query.shape[1], key.shape[1]
    masked = torch.ones(length, length).triu(1).bool()
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        scores = query[:, head] @ key[:, group].T * scale
        weights = torch.softmax(scores.masked_fill(masked, float("-inf")), dim=-1)
        outputs.append(weights @ value[:, group])
    return torch.cat(outputs, dim=1)


def attention(groups: int, lengths: list[int]) -> dict[str, float]:
    """Largest differences of the module from the formula, for a batch of two and for ``lengths`` in one packed row."""
    parallel.start()
    generator = torch.Generator().manual_seed(groups)
    module = _attention()
    shapes = [(HEADS, HEAD_SIZE), (groups, HEAD_SIZE), (groups, HEAD_SIZE)]
    batch = [torch.randn(9, 2, *shape, generator=generator) for shape in shapes]
    unpacked = module(*batch, attention_mask=None)
    expected = torch.stack([_eager(*(x[:, row] for x in batch), HEAD_SIZE**-0.5) for row in range(2)], dim=1)
    row = [torch.randn(sum(lengths), *shape, generator=generator) for shape in shapes]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = module(*row, attention_mask=None, packed_seq_params=_bounds(bounds))
    stretches = [[x[a:b] for x in row] for a, b in itertools.pairwise(bounds)]
    apart = torch.cat([_eager(*stretch, HEAD_SIZE**-0.5) for stretch in stretches])
    return {
        "unpacked": float((unpacked - expected).abs().max()),
        "packed": float((packed - apart).abs().max()),
        "packed as one stretch": float((_eager(*row, HEAD_SIZE**-0.5) - apart).abs().max()),
    }


def refused_attention_inputs() -> dict[str, str]:
    """What the module says to inputs that it would otherwise answer wrongly."""
    parallel.start()
    module = _attention()
    row = [torch.zeros(4, HEADS, HEAD_SIZE)] * 3
    short = _bounds(torch.tensor([0, 3]))
    calls = {
        "a mask": lambda: module(*row, attention_mask=torch.zeros(1)),
        "a bias": lambda: module(*row, attention_mask=None, attention_bias=torch.zeros(1)),
        "bounds that end early": lambda: module(*row, attention_mask=None, packed_seq_params=short),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except AssertionError as error:
            said[name] = str(error)
    return said


def masked_softmax(vocab_size: int, shard: int, ranks: int) -> dict:
    """Probabilities of ``ranks`` shards after masking, and what the backward pass hands to the columns."""
    logits = torch.zeros(2, shard * ranks, requires_grad=True)
    shards = [
        mask_padded_columns(logits[:, r * shard : (r + 1) * shard], vocab_size, SimpleNamespace(rank=lambda r=r: r))
        for r in range(ranks)
    ]
    probabilities = torch.softmax(torch.cat(shards, dim=1), dim=-1)
    probabilities[:, 0].sum().backward()
    return {
        "probabilities": probabilities.detach(),
        "gradient": logits.grad,
        "finite": bool(logits.grad.isfinite().all()),
    }


def image_features(job: Job, counts: list[int]) -> list[dict]:
    """For every number of images: features [n, tokens, h] and the connector's gradients, as this rank has them."""
    parallel.start(job.tensor)
    _, (model,) = build(job)
    tower = model.vision_tower
    found = []
    for count in counts:
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randn(count, 3, 28, 28, generator=generator)
        share = -(-count // job.tensor)
        rank = model.pg_collection.tp.rank()
        model.zero_grad()
        seen = []
        handle = tower.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[0]))
        if count:
            features = model.image_features(pixels[rank * share : (rank + 1) * share], count)
        else:
            features = pixels.new_zeros(0, 16, model.config.hidden_size)
        handle.remove()
        weights = torch.randn(features.shape, generator=generator)
        if count:
            (features * weights).sum().backward()
        found.append(
            {
                "features": features.detach(),
                "encoded": sum(seen),
                "gradients": {n: p.grad for n, p in model.connector.named_parameters() if p.grad is not None},
                "tower_gradients": [n for n, p in tower.named_parameters() if p.grad is not None],
            }
        )
    return found


def text_only_embeddings(job: Job) -> dict:
    """Embeddings of a batch without pictures, and whether the connector took part with a gradient of zero."""
    parallel.start(job.tensor)
    _, (model,) = build(job)
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "position_ids": ids, "num_images": 0, "pixel_values": None}
    embeddings = model._embed(batch)
    embeddings.sum().backward()
    plain = model.language_model.embedding(input_ids=ids, position_ids=ids)
    return {
        "equal": torch.equal(embeddings, plain),
        "gradients": {n: p.grad for n, p in model.connector.named_parameters()},
    }


def parts(job: Job) -> dict:
    """Which parts this rank holds, and what trains after each choice of trainable parts."""
    parallel.start(job.tensor, job.pipeline, job.virtual)
    _, chunks = build(job)
    trained = {}
    for choice in ("connector", "llm", "connector,llm"):
        for model in chunks:
            model.set_trainable(set(choice.split(",")))
        names = [n for model in chunks for n, p in model.named_parameters() if p.requires_grad]
        trained[choice] = sorted({name.split(".")[0] for name in names})
    for model in chunks:
        model.train()
    return {
        "parts": [sorted({n.split(".")[0] for n, _ in model.named_parameters()}) for model in chunks],
        "trained": trained,
        "tower_trains": any(m.training for model in chunks if model.vision_tower for m in model.vision_tower.modules()),
        "saved_without_tower": [
            sorted({name.split(".")[0] for name in model.state_dict_for_save_checkpoint()}) for model in chunks
        ],
    }


def load_state(job: Job) -> dict:
    """What ``load_state_dict`` makes of a checkpoint beside a connector that was given by a file."""
    parallel.start()
    _, (model,) = build(job)
    saved = model.state_dict_for_save_checkpoint()
    # megatron-core's layers announce an extra state, which is None here.
    state = {name: value if value is None else torch.full_like(value, 3.0) for name, value in saved.items()}
    given = model.connector.mlp[0].weight.detach().clone()
    model.connector_is_given = True
    keys = [key for key in model.sharded_state_dict() if key.startswith("connector.")]
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("connector.")})
    kept = torch.equal(model.connector.mlp[0].weight, given)
    model.load_state_dict(state)
    try:
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith("connector.")})
        missing = ""
    except RuntimeError as error:
        missing = str(error)
    return {
        "keys_while_given": keys,
        "given_is_kept": kept,
        "the_next_load_counts": bool((model.connector.mlp[0].weight == 3.0).all()),
        "missing": missing,
    }


class _NormWithState(torch.nn.RMSNorm):
    """A norm that announces a state, as Transformer Engine's does: an empty tensor, and None for the same."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state is None or state.numel() == 0


def idle_state(job: Job, folder: str) -> dict:
    """Keys and loading of a checkpoint where the final norm and those of heads announce a state and do not."""
    from megatron.core import dist_checkpointing

    from dc_megatron.inference.assemble import load_checkpoint

    parallel.start()
    keys = {}
    models = {}
    for name in ("torch", "transformer engine"):
        _, (models[name],) = build(job)
        norm = models[name].language_model.decoder.final_layernorm
        if name != "torch":
            for place, module in models[name].language_model.named_modules():
                if place.endswith(("final_layernorm", "q_layernorm", "k_layernorm")):
                    module.__class__ = _NormWithState
        with torch.no_grad():
            norm.weight.mul_(2.0 if name == "torch" else 3.0)
        os.makedirs(os.path.join(folder, name))
        state = models[name].sharded_state_dict()
        keys[name] = sorted(state)
        dist_checkpointing.save({"model": state}, os.path.join(folder, name))
    weights = {
        name: model.language_model.decoder.final_layernorm.weight.detach().clone() for name, model in models.items()
    }
    load_checkpoint(models["torch"], os.path.join(folder, "transformer engine"))
    load_checkpoint(models["transformer engine"], os.path.join(folder, "torch"))
    loaded = {name: model.language_model.decoder.final_layernorm.weight for name, model in models.items()}
    return {
        "keys": keys,
        "exchanged": torch.equal(loaded["torch"], weights["transformer engine"])
        and torch.equal(loaded["transformer engine"], weights["torch"])
        and not torch.equal(weights["torch"], weights["transformer engine"]),
    }


@contextmanager
def _pretended(world_size: int, words: list[str]):
    """argv and environment of the last of ``world_size`` processes (rank 0 would print all arguments)."""
    from megatron.training import arguments

    environment, argv, arch = dict(os.environ), sys.argv, arguments.get_device_arch_version
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(max(world_size - 1, 1)), CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.argv, arguments.get_device_arch_version = ["pretrain", *words], lambda: 9
    try:
        yield arguments
    finally:
        sys.argv, arguments.get_device_arch_version = argv, arch
        os.environ.clear()
        os.environ.update(environment)


def _shown(value) -> str:
    """Functions and partial functions by what they compute, not by where they lie."""
    if callable(value):
        inner = getattr(value, "func", value)
        return f"{inner.__module__}.{inner.__qualname__} {getattr(value, 'keywords', '')}"
    return repr(value)


def configurations(language: LanguageConfig, line: str, world_size: int, layout: dict) -> dict[str, tuple[str, str]]:
    """Fields of the TransformerConfig that differ between the engine's, derived from flags, and ours."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from dc_megatron.training.arguments import backend_argv, engine_argv, plan_steps
    from dc_megatron.training.argv import translate

    translation = translate(shlex.split(line))
    steps = plan_steps(translation.settings, 1000, world_size, mean_length=500.0)
    words = engine_argv(translation, language, steps, backend_argv(False, False, False))
    with _pretended(world_size, words) as arguments:
        args = arguments.parse_args()
        arguments.validate_args(args)
        engine = core_transformer_config_from_args(args)
    ours = transformer_config(language, Layout(**layout))
    pairs = {f.name: (_shown(getattr(engine, f.name)), _shown(getattr(ours, f.name))) for f in fields(ours)}
    return {name: (theirs, own) for name, (theirs, own) in pairs.items() if theirs != own}


def initial_connector(job: Job) -> dict[str, torch.Tensor]:
    """The connector as built, before any file fills it."""
    from dc_megatron.config import VisionConfig

    parallel.start(job.tensor, seed=100 + job.tensor)
    language = LanguageConfig.from_folder(job.language_folder)
    model = build_model(
        language,
        VisionConfig.from_folder(job.vision_folder),
        ConnectorConfig(job.connector_type),
        transformer_config(language, Layout(job.tensor)),
        vocab_rows=1024,
        max_sequence_length=128,
        transformer_engine=False,
        seed=5,
    )
    return model.connector.state_dict()
