"""Reads what the quickstart's stages left behind; writes summary.json and the loss curve, and prints the first screen.

Usage: python examples/quickstart/summary.py --run runs/quickstart [--tensor-parallel 2]

In RUN it expects text/, stage1/ and stage2/ (each with metrics.jsonl), answers/stage1.jsonl, answers/stage2.jsonl and
answers/export.jsonl (JSON lines with id, question, expected, answer) and data/held_out.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from loss_curve import draw_loss_curve

from dc_megatron.errors import UserError

# folder in RUN -> what the stage does, as printed
STAGES = {
    "text": "language model, from text alone",
    "stage1": "connector alone, from pictures",
    "stage2": "connector and language model",
}
# The mean over this many steps at either end of a stage stands for its first and last loss: single steps are noisy.
WINDOW = 5


def read_json_lines(path: str) -> list[dict]:
    """The objects of a JSON-lines file; UserError where it is missing, empty or broken."""
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the step of the quickstart that writes it did not finish") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines: {error}") from None
    if not records:
        raise UserError(f"{path}: empty; the step of the quickstart that writes it did not finish")
    return records


def is_right(record: dict) -> bool:
    """Whether the answer is the expected one; case, outer spaces and a full stop do not count."""
    return _plain(record["answer"]) == _plain(record["expected"])


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def accuracies(answers: list[dict]) -> dict[str, float | None]:
    """Share of right answers to ``scene``, ``blank`` and ``photograph`` questions (by id); None: none was asked."""
    groups: dict[str, list[bool]] = {"scene": [], "blank": [], "photograph": []}
    for record in answers:
        first = record["id"].split("-")[0]
        groups[first if first in groups else "scene"].append(is_right(record))
    return {name: sum(hits) / len(hits) if hits else None for name, hits in groups.items()}


def summarise_stage(name: str, metrics: list[dict], accuracy: float | None) -> dict:
    """One entry of summary.json: losses in nats a supervised token, seconds summed over the steps."""
    losses = [entry["loss"] for entry in metrics if entry.get("loss") is not None]
    if not losses:
        raise UserError(f"{name}: metrics.jsonl has no loss in it")
    window = min(WINDOW, len(losses))
    return {
        "name": name,
        "first_loss": sum(losses[:window]) / window,
        "last_loss": sum(losses[-window:]) / window,
        "seconds": sum(entry["step_seconds"] for entry in metrics),
        # Part of the rows' positions that samples filled; the rest was padding.
        "fill": sum(entry["tokens"] for entry in metrics) / sum(entry["positions"] for entry in metrics),
        "accuracy": accuracy,
    }


def summarise(metrics: dict[str, list[dict]], answers: dict[str, list[dict]], tensor_parallel: int) -> dict:
    """The content of summary.json. ``metrics``: an entry for each stage; ``answers``: for stage1, stage2 and export."""
    after = {name: accuracies(records) for name, records in answers.items()}
    pairs = _both(answers["stage2"], answers["export"])
    same = [one["answer"].strip() == other["answer"].strip() for one, other in pairs]
    return {
        "stages": [
            summarise_stage(name, metrics[name], after[name]["scene"] if name in after else None) for name in STAGES
        ],
        "accuracy": after["stage2"]["scene"],
        "accuracy_blank_image": after["stage2"]["blank"],
        "accuracy_photographs": after["stage2"]["photograph"],
        "questions": len(same),
        "same_answers_from_the_export": sum(same),
        "tensor_model_parallel_size": tensor_parallel,
    }


def _both(one: list[dict], other: list[dict]) -> list[tuple[dict, dict]]:
    """The answers of two models to the same questions, by id; UserError where one was not asked all of them."""
    by_id = {record["id"]: record for record in other}
    if [record["id"] for record in one if record["id"] not in by_id]:
        raise UserError("answers/export.jsonl: not the questions of answers/stage2.jsonl; run the quickstart again")
    return [(record, by_id[record["id"]]) for record in one]


def examples(answers: list[dict], held_out: list[dict], image_folder: str) -> list[dict]:
    """The first answer about a scene and the first about a photograph, right or wrong, with the picture's path."""
    pictures = {record["id"]: os.path.join(image_folder, record["image"]) for record in held_out}
    chosen = {}
    for record in answers:
        kind = record["id"].split("-")[0]
        if kind != "blank":
            chosen.setdefault("photograph" if kind == "photograph" else "scene", record)
    return [
        record | {"picture": pictures[record["id"]], "question": record["question"].replace("<image>", "").strip()}
        for record in chosen.values()
    ]


def first_screen(summary: dict, shown: list[dict], run: str) -> str:
    """What a newcomer reads at the end."""
    lines = ["", f"{'stage':<38}{'loss':>16}{'row fill':>11}{'seconds':>10}{'accuracy':>11}"]
    for stage in summary["stages"]:
        title = f"{stage['name']}: {STAGES[stage['name']]}"
        losses = f"{stage['first_loss']:.2f} -> {stage['last_loss']:.2f}"
        fill = f"{100 * stage['fill']:.1f} %"
        accuracy = _percent(stage["accuracy"])
        lines.append(f"{title:<38}{losses:>16}{fill:>11}{stage['seconds']:>10.0f}{accuracy:>11}")
    lines += [
        "",
        f"Held-out questions about pictures it has not seen: {_percent(summary['accuracy'])} right;"
        f" with a blank picture {_percent(summary['accuracy_blank_image'])}.",
        f"New crops of the photographs: {_percent(summary['accuracy_photographs'])} right.",
        f"Plain transformers, from the exported folder: the same answer to {summary['same_answers_from_the_export']} of"
        f" {summary['questions']} questions.",
        "",
    ]
    for example in shown:
        expected = "" if is_right(example) else f"   (expected: {example['expected']})"
        lines += [example["picture"], f"    {example['question']}  ->  {example['answer'].strip()}{expected}"]
    question = shown[0]["question"]
    lines += [
        "",
        f"checkpoint  {run}/stage2",
        f"export      {run}/export   (stock Hugging Face Llava)",
        f"loss curve  {run}/loss.png",
        f"numbers     {run}/summary.json",
        "",
        "Next, ask it yourself:",
        f"  .venv/bin/python tools/generate.py --load {run}/stage2 --image {shown[0]['picture']} \\",
        f'      --prompt "{question}"',
        "and examples/pretrain_dc.sh is the recipe for a real model.",
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the quickstart's run")
    parser.add_argument("--tensor-parallel", type=int, default=2, help="recorded in summary.json (default %(default)s)")
    options = parser.parse_args()
    run = options.run.rstrip("/")

    metrics = {name: read_json_lines(f"{run}/{name}/metrics.jsonl") for name in STAGES}
    answers = {name: read_json_lines(f"{run}/answers/{name}.jsonl") for name in ("stage1", "stage2", "export")}
    with open(f"{run}/data/held_out.json", encoding="utf-8") as file:
        held_out = json.load(file)
    summary = summarise(metrics, answers, options.tensor_parallel)
    with open(f"{run}/summary.json", "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
    draw_loss_curve({f"{name}: {STAGES[name]}": metrics[name] for name in STAGES}, f"{run}/loss.png")
    print(first_screen(summary, examples(answers["stage2"], held_out, f"{run}/data"), run))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
