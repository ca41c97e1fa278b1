"""The report on a checkpoint in lines, for people."""

from __future__ import annotations


def as_text(report: dict, every_tensor: bool = False) -> str:
    """The report in lines."""
    lines = [f"{report['path']}: {report['title']}, {_gigabytes(report['size'])}"]
    lines += _model_lines(report["model"])
    lines += [_tree_line(entry) for entry in report["checkpoints"]]
    for part in report["parts"]:
        lines.append(
            f"  {part['name']}: {part['tensors']} tensors, {_count(part['elements'])} numbers in {part['dtype']}"
        )
    if every_tensor:
        lines += [f"    {tensor['name']} {tensor['shape']} {tensor['dtype']}" for tensor in report["tensors"]]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]]
    lines.append(_verdict(report))
    return "\n".join(lines)


def _model_lines(model: dict | None) -> list[str]:
    if model is None:
        return []
    lines = []
    if "family" in model:
        lines.append(
            f"  language model: {model['family']}, {model['layers']} layers x {model['hidden_size']},"
            f" {model['attention_heads']} heads ({model['key_value_heads']} for keys and values),"
            f" vocabulary {model['vocabulary']}"
        )
    tower = model.get("vision_tower")
    if tower:
        shape = f"{tower.get('family', '')} {tower.get('layers', '?')} layers x {tower.get('hidden_size', '?')}"
        place = f"trained, inside; began as {tower['path']}" if tower.get("trained") else tower.get("path") or "inside"
        lines.append(f"  vision tower: {shape.strip()}, {place}")
    said = [
        f"{name.replace('_', ' ')} {model[name]}"
        for name in (
            "adapters",
            "connector",
            "template",
            "image_aspect_ratio",
            "mm_patch_merge_type",
            "model_max_length",
        )
        if model.get(name)
    ]
    if "family" in model and not tower and not model.get("connector"):
        said.insert(0, "a language model alone")
    lines += [f"  {', '.join(said)}"] if said else []
    if "parameters" in model:
        lines.append(f"  parameters as stored: {_count(model['parameters'])}")
    return lines


def _tree_line(entry: dict) -> str:
    said = [f"{entry['files']} files", _gigabytes(entry["size"])]
    if entry["consumed_samples"] is not None:
        said.append(f"{entry['consumed_samples']} samples seen")
    tokens = entry["consumed_tokens"] or {}
    if tokens:
        said.append(f"{tokens.get('processed')} tokens ({tokens.get('supervised')} supervised)")
    if entry["source"]:
        said.append(f"from {entry['source']}")
    return f"  {entry['name']}: {'complete' if entry['complete'] else 'NOT COMPLETE'}, {', '.join(said)}"


def _verdict(report: dict) -> str:
    if report["verified"]:
        return "complete; every file is as it was written"
    if report["problems"]:
        return f"damaged or incomplete: {len(report['problems'])} problems"
    if report["complete"]:
        return "complete by names and sizes" + ("; --check reads every file" if report["hashes"] else "")
    return "nothing is known about its completeness"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _count(number: int) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)
