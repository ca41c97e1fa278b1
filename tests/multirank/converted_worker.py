"""What ranks do for the tests of converted checkpoints: load them, answer with logits, and save what they loaded."""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from unittest import mock

import torch

from dc_megatron.config import LanguageConfig
from dc_megatron.inference.assemble import load_vision_tower
from dc_megatron.inference.session import Session
from dc_megatron.inference.source import Source, resolve
from dc_megatron.model.language_model import Layout
from tests.multirank.parity_worker import share_pixels
from tests.multirank.tree_worker import build_chunks, start


@contextmanager
def _strict():
    """Megatron refuses keys that the tree has and the model not, and the other way round."""
    from megatron.core import dist_checkpointing

    strict = functools.partial(dist_checkpointing.load, strict="raise_all")
    with mock.patch.object(dist_checkpointing, "load", strict):
        yield


def logits(sources: list[Source], batch: dict) -> list[torch.Tensor | None]:
    """Logits [b, s, vocabulary] of each model on the last stage, through the inference room."""
    found = []
    for source in sources:
        with _strict():
            session = Session(resolve(source))
        group = session.unwrapped.pg_collection.tp
        shared = share_pixels(batch, group.rank(), group.size())
        output = session.forward(shared, torch.arange(batch["input_ids"].numel()))
        found.append(None if output is None else output.unflatten(0, batch["input_ids"].shape))
    return found


def logits_of_virtual_stages(folders: list[str], vision_folder: str, batch: dict) -> list[torch.Tensor | None]:
    """The same at PP 2 with two virtual stages a rank, which inference does not offer and training does."""
    from megatron.core import dist_checkpointing
    from megatron.core.pipeline_parallel import get_forward_backward_func

    layout = Layout(1, 2, 2)
    start(layout)
    found = []
    for folder in folders:
        resolved = resolve(Source(load=folder))
        chunks = build_chunks(LanguageConfig.from_folder(os.path.join(folder, "hf")), vision_folder, layout)
        parts = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
        state = dist_checkpointing.load(parts, resolved.iteration_folder, strict="raise_all")
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(state[f"model{number}"])
            if chunk.vision_tower is not None:
                load_vision_tower(chunk, resolved.vision, resolved.connector)
        positions = torch.arange(batch["input_ids"].numel())

        def forward_step(iterator, model, positions=positions):
            return model(batch, positions=positions), lambda output, non_loss_data=True: output

        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[None] * len(chunks),
                model=[chunk.eval() for chunk in chunks],
                num_microbatches=layout.pipeline_model_parallel_size,
                seq_length=batch["input_ids"].shape[1],
                micro_batch_size=batch["input_ids"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        found.append(outputs[0].unflatten(0, batch["input_ids"].shape) if outputs else None)
    return found


def save(sources: list[Source], folders: list[str]) -> None:
    """Read each model straight from its Hugging Face folder and let Megatron write a tree of it."""
    from megatron.core import dist_checkpointing

    for source, folder in zip(sources, folders, strict=True):
        session = Session(resolve(source))
        os.makedirs(folder, exist_ok=True)
        dist_checkpointing.save({"model": session.unwrapped.sharded_state_dict()}, folder)
