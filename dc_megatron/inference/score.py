"""Per-sample loss of a data set under a model: what tools/score.py does."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch

from dc_megatron.config import DataConfig, image_share
from dc_megatron.data.image_loading import image_loader, tile_requests
from dc_megatron.data.image_store import open_stores
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.index_waiting import build_or_wait
from dc_megatron.data.rows import assemble, row_length
from dc_megatron.data.sources import read_sources
from dc_megatron.inference.session import Runner, Session
from dc_megatron.inference.source import Source, resolve


def score_file(
    source: Source,
    data_path: str,
    image_folder: str,
    *,
    model_max_length: int | None = None,
    max_bad_sample_rate: float = 0.001,
    image_backend: str = "auto",
    rows: int = 8,
) -> tuple[list[dict], dict]:
    """(entries, total) of a LLaVA data file; see ``score`` and ``total``. Rank 0 gets them all.

    Raises UserError as training does for the same data and folders.
    """
    resolved = resolve(source)
    length = model_max_length or resolved.model_max_length or 2048
    config = DataConfig(
        sources=read_sources([data_path], [image_folder] if image_folder else []),
        tokenizer_path=os.path.join(source.load, "hf") if source.load else source.model_name_or_path,
        version=resolved.version,
        image_aspect_ratio=resolved.image_aspect_ratio,
        model_max_length=length,
        seq_length=length,
        tiling=resolved.tiling,
        order="sequential",
        image_backend=image_backend,
        max_bad_sample_rate=max_bad_sample_rate,
        vocab_size=resolved.language.vocab_size,
    )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    folder = _meeting_folder()
    index = build_or_wait(config, folder, local_rank)
    session = Session(resolved)
    entries = score(session, index, config, rows)
    # All ranks have opened the index by now, and an open file outlives its name.
    if local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return entries, total(entries, index.summary.dropped)


def _meeting_folder() -> str:
    """A folder for the index that all ranks of this run on this node can name, and no other run has."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    run = f"{launch}_{os.environ.get('MASTER_PORT', '')}" if "MASTER_PORT" in os.environ else str(os.getpid())
    return os.path.join(tempfile.gettempdir(), f"dc_megatron_score_{os.getuid()}_{run}")


def score(session: Runner, index: SampleIndex, config: DataConfig, rows: int = 8) -> list[dict]:
    """One entry for each sample of ``index``, in its order: id, index, loss, supervised_tokens, input_tokens, images.

    ``loss`` is the mean over the sample's supervised tokens. ``rows`` samples run at once; data-parallel ranks take
    turns. Every rank calls it; rank 0 gets the list, the others an empty one.
    """
    from megatron.core import parallel_state

    data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    loader, stores = None, open_stores(config.sources)
    if session.unwrapped.connector is not None:
        vision = session.resolved.vision
        loader = image_loader(config.image_backend, vision, config.image_aspect_ratio, config.tiling)
    mine = []
    for first in range(data_rank * rows, len(index), rows * data_size):
        samples = [index[number] for number in range(first, min(first + rows, len(index)))]
        mine += _score_rows(session, samples, config, loader, stores)
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if torch.distributed.get_rank():
        return []
    return sorted((entry for part in everyone for entry in part), key=lambda entry: entry["index"])


def _score_rows(session: Runner, samples: list, config: DataConfig, loader, stores) -> list[dict]:
    """Entries of some samples, on the first tensor-parallel rank of the last stage; elsewhere none."""
    rows = [[sample] for sample in samples]
    batch = assemble(rows, row_length(rows, session.resolved.source.tensor_model_parallel_size), config.tiling)
    batch["pixel_values"] = _pixels(session, batch, loader, stores)
    losses = session.forward(batch)
    group = session.unwrapped.pg_collection.tp
    if losses is None or group.rank():
        return []
    counts = (batch["labels"] != -100).sum(dim=1).tolist()
    entries = []
    for sample, own in zip(samples, losses.cpu().split(counts), strict=True):
        entries.append(
            {
                "id": sample.identifier,
                "index": sample.record,
                "loss": float(own.double().mean()) if len(own) else None,
                "supervised_tokens": len(own),
                "input_tokens": sample.length,
                "images": len(sample.images),
            }
        )
    return entries


def _pixels(session: Runner, batch: dict, loader, stores) -> torch.Tensor | None:
    """This tensor-parallel rank's share of the tiles; None off the first stage."""
    if loader is None:
        return None
    group = session.unwrapped.pg_collection.tp
    share = image_share(batch["num_images"], group.rank(), group.size())
    pixels, _ = loader.load(tile_requests(batch["pictures"], stores, share))
    return pixels


def total(entries: list[dict], dropped: dict[str, int]) -> dict:
    """The closing entry: mean loss over all supervised tokens, and what was left out."""
    tokens = sum(entry["supervised_tokens"] for entry in entries)
    loss = sum(entry["loss"] * entry["supervised_tokens"] for entry in entries if entry["supervised_tokens"])
    return {
        "total": True,
        "samples": len(entries),
        "loss": loss / tokens if tokens else None,
        "supervised_tokens": tokens,
        "input_tokens": sum(entry["input_tokens"] for entry in entries),
        "images": sum(entry["images"] for entry in entries),
        "dropped": dropped,
    }
