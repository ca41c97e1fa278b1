#!/usr/bin/env python
"""Looks at a data set before a GPU is rented: what is lost, what is odd, how it packs, which lengths to train with.

Prints one screen and writes a page with plots, thumbnails and a few samples as the model gets them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/preflight.py --model_name_or_path checkpoints/vicuna-7b-v1.5 \\
    --vision_tower checkpoints/clip-vit-large-patch14-336 --version v1 --image_aspect_ratio pad \\
    --data_path data/llava_v1_5_mix665k.json --image_folder data/images --index-folder runs/stage2/index
  python tools/preflight.py ... --data_path a.json:1.0 b.json:0.5 --image_folder images-a images-b
  python tools/preflight.py ... --decode all --json

The flags are training's. A run with --output_dir runs/stage2 keeps its index in runs/stage2/index, and finds there what
this tool built.

exit status: 0 the data can be trained on, 1 it is refused (the reasons are printed), 2 wrong use or unreadable input
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    from dc_megatron.config import CONNECTOR_TYPES, IMAGE_ASPECT_RATIOS, MERGE_TYPES, TEMPLATES
    from dc_megatron.inference.flags import add_flag
    from dc_megatron.reports.preflight_settings import PreflightSettings as Default

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, text: str, **options) -> None:
        default = options.get("default")
        shown = f"{text} (default: {default})" if default not in (None, "", ()) else text
        add_flag(parser, name, help=shown, **options)

    add("data_path", "LLaVA JSON or JSON Lines files, or one YAML file", nargs="+", required=True, metavar="FILE")
    add("image_folder", "folders, tar shards or addresses: one, or one a file", nargs="+", default=(), metavar="DIR")
    add("model_name_or_path", "language model folder; its tokenizer is used", required=True, metavar="DIR")
    add("vision_tower", "the tower's folder (CLIP, SigLIP, ...); its config.json is used", required=True, metavar="DIR")
    add("version", "conversation template", required=True, choices=TEMPLATES)
    add("mm_dense_connector_type", "", default=Default.mm_dense_connector_type, choices=CONNECTOR_TYPES)
    add("image_aspect_ratio", "", default=Default.image_aspect_ratio, choices=IMAGE_ASPECT_RATIOS)
    add("image_grid_pinpoints", "resolutions of anyres", default="", metavar="LIST")
    add("mm_patch_merge_type", "how anyres joins tiles", default="", choices=("", *MERGE_TYPES))
    add("model_max_length", "", type=int, default=Default.model_max_length, metavar="N")
    add("video_frames", "", type=int, default=Default.video_frames, metavar="N")
    add("max_bad_sample_rate", "", type=float, default=Default.max_bad_sample_rate, metavar="RATE")
    add("index_folder", "keep the index there, for training", default="", metavar="DIR")
    add("seed", "of random choices", type=int, default=Default.seed, metavar="N")
    add("decode", "pictures to decode whole: a number, all or none", default=str(Default.decode), metavar="N")
    add("samples_per_step", "batch that steps are given for", type=int, default=Default.samples_per_step, metavar="N")
    parser.add_argument("--html", default="", metavar="FILE", help="page (default: preflight.html beside the index)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = vars(parse(argv))
    as_json = options.pop("json")
    from dc_megatron.errors import UserError

    try:
        from dc_megatron.reports.preflight_settings import PreflightSettings, decode_count

        options |= {name: tuple(options[name]) for name in ("data_path", "image_folder")}
        settings = PreflightSettings(**options | {"decode": decode_count(options["decode"])})

        from dc_megatron.reports.preflight import preflight
        from dc_megatron.reports.preflight_text import as_text
        from dc_megatron.reports.progress_line import ProgressLine

        line = ProgressLine()
        try:
            report = preflight(settings, line)
        finally:
            line.finish()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1) if as_json else as_text(report))
    return 1 if report["verdict"] == "refused" else 0


if __name__ == "__main__":
    sys.exit(main())
