"""Hand-made micro-batches in the form the data room delivers, for models whose pictures are random numbers."""

import itertools

import torch


def make_batch(
    rows: list,
    seq_length: int,
    *,
    tokens_per_image: int,
    image_size: int = 28,
    packed: bool = False,
    lengths: list[int] | None = None,
) -> dict:
    """A Batch of ``rows``; a row is one sample or, with ``packed``, a list of samples.

    A sample is a list of ``("text", ids)`` and ``("image", number)``; the pixels of an image depend on its number
    only. Every text id that follows something is a target. ``lengths`` truncates the samples, one value a row.
    """
    rows = rows if packed else [[sample] for sample in rows]
    columns = {"input_ids": [], "labels": [], "position_ids": [], "feature": []}
    bounds, images, tokens = [0], [], 0
    for number, samples in enumerate(rows):
        used = 0
        for sample in samples:
            start = len(images)
            content = _expand(sample, tokens_per_image, images)
            if lengths is not None:
                content = content[: lengths[number]]
            _append(columns, content, start * tokens_per_image)
            used += len(content)
            bounds.append(bounds[-1] + len(content))
        assert used <= seq_length, f"a row holds {used} positions of {seq_length}"
        tokens += used
        if used < seq_length:
            _append(columns, [None] * (seq_length - used), 0)
            bounds.append(bounds[-1] + seq_length - used)
    return _tensors(columns, bounds, images, tokens, len(rows), image_size, sum(len(samples) for samples in rows))


def _expand(sample: list, tokens_per_image: int, images: list[int]) -> list:
    """One entry a position: the id, or ``("feature", row counted from the sample's first image)``."""
    content, seen = [], 0
    for kind, value in sample:
        if kind == "text":
            content += value
        else:
            images.append(value)
            content += [("feature", seen * tokens_per_image + i) for i in range(tokens_per_image)]
            seen += 1
    return content


def _append(columns: dict, content: list, first_feature: int) -> None:
    for position, entry in enumerate(content):
        following = content[position + 1] if position + 1 < len(content) else None
        columns["input_ids"].append(entry if isinstance(entry, int) else 0)
        columns["labels"].append(following if isinstance(following, int) else -100)
        columns["position_ids"].append(position)
        columns["feature"].append(first_feature + entry[1] if isinstance(entry, tuple) else -1)


def _tensors(columns, bounds, images, tokens, rows, image_size, samples) -> dict:
    shaped = {name: torch.tensor(values).reshape(rows, -1) for name, values in columns.items()}
    feature = shaped.pop("feature")
    mask = feature >= 0
    pixels = [torch.randn(3, image_size, image_size, generator=torch.Generator().manual_seed(i)) for i in images]
    return {
        **shaped,
        "image_mask": mask,
        "image_feature_index": feature[mask],
        "pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size),
        "num_images": len(images),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "max_seqlen": max(b - a for a, b in itertools.pairwise(bounds)),
        "counts": {
            "samples": samples,
            "positions": shaped["labels"].numel(),
            "tokens": tokens,
            "supervised_tokens": int((shaped["labels"] != -100).sum()),
            "images": len(images),
            "tiles": len(images),
            "substituted_images": 0,
        },
    }
