#!/usr/bin/env python
"""Says how to lay out a training job before a node is allocated: layouts, memory, speed, and the command to start it.

Pure arithmetic: no GPU, no weights, no data. A dry run (--dry-run behind any recipe) then builds what was planned.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/plan.py --model llama3-70b --vision siglip-so400m --stage finetune --gpus 64 --gpu-memory 80
  python tools/plan.py --model checkpoints/vicuna-7b-v1.5 --vision clip-vit-large-patch14-336 --gpus 1 --gpu h200
  NNODES=8 GPUS_PER_NODE=8 python tools/plan.py --check examples/finetune_dc.sh --gpu h100

exit status: 0 there is a plan that fits, 1 there is none, 2 wrong use
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    from dc_megatron.config import CONNECTOR_TYPES, IMAGE_ASPECT_RATIOS, PACKINGS
    from dc_megatron.planner.job import GPUS, PRECISIONS
    from dc_megatron.planner.request import STAGES, presets
    from dc_megatron.planner.request import Request as Default

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, text: str, **options) -> None:
        default = getattr(Default, name, None)
        names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        shown = f"{text} (default: {default})" if default else text
        parser.add_argument(*names, default=default, help=shown, **options)

    add("model", f"a language model's folder, or one of {presets()}", metavar="NAME")
    add("vision", "a tower's folder or name", metavar="NAME")
    add("stage", "what is trained", choices=tuple(STAGES))
    add("gpus", "GPUs of the job", type=int, metavar="N")
    add("gpu", "what they are", choices=tuple(GPUS))
    add("gpu_memory", "GB of each; 0: as its maker says", type=float, metavar="GB")
    add("gpus_per_node", "GPUs of a machine", type=int, metavar="N")
    add("connector", "dense connector", choices=CONNECTOR_TYPES)
    add("samples_per_step", "global batch; 0: 256 for pretrain, else 128", type=int, metavar="N")
    add("samples", "samples of the data; 0: LLaVA-1.5's", type=int, metavar="N")
    add("epochs", "passes over the data", type=float, metavar="N")
    add("model_max_length", "longest sample", type=int, metavar="N")
    add("seq_length", "length of packed rows; 0: 4096 and 8192 are tried", type=int, metavar="N")
    add("packing", "rows", choices=PACKINGS)
    add("image_aspect_ratio", "pictures", choices=IMAGE_ASPECT_RATIOS)
    add("precision", "numbers to try; none given: what the GPU is for", nargs="+", choices=tuple(PRECISIONS))
    add("lora_r", "rank of --stage lora", type=int, metavar="R")
    parser.add_argument("--check", default="", metavar="RECIPE", help="plan what a recipe says, in this environment")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if not options.check and not (options.model and options.vision and options.gpus):
        parser.error("give --model, --vision and --gpus, or --check RECIPE")
    return options


def main(argv: list[str] | None = None) -> int:
    options = vars(parse(argv))
    recipe, as_json = options.pop("check"), options.pop("json")
    from dc_megatron.errors import UserError

    try:
        found, text = _check(recipe, options) if recipe else _search(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if as_json else text)
    return 0 if any(plan["fits"] for plan in found["plans"]) else 1


def _search(options: dict) -> tuple[dict, str]:
    from dc_megatron.planner.request import Request, job_of, launch_of_request
    from dc_megatron.planner.search import search
    from dc_megatron.reports.plan_text import plan_json, plan_text

    request = Request(**options | {"precision": tuple(options["precision"] or ())})
    job = job_of(request)
    verdicts = search(job)
    launch = launch_of_request(request, job, verdicts[0].plan) if verdicts[0].plan else None
    return plan_json(job, verdicts, launch), plan_text(job, verdicts, launch)


def _check(recipe: str, options: dict) -> tuple[dict, str]:
    from dc_megatron.planner.request import gpu_of
    from dc_megatron.reports.plan_text import checked_text, plan_values
    from dc_megatron.training.plan_recipe import planned, recipe_words

    gpu = gpu_of(options["gpu"], options["gpu_memory"])
    job, plan = planned(*recipe_words(recipe), gpu, options["gpus_per_node"])
    return {"plans": [plan_values(job, plan)]}, checked_text(job, plan)


if __name__ == "__main__":
    sys.exit(main())
