#!/usr/bin/env python
"""Asks a Dense Connector model about pictures; greedy answers."""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/generate.py --load runs/quickstart/stage2 --image photo.jpg --prompt "What is in the picture?"
  python tools/generate.py --model_name_or_path vicuna-7b --vision_tower clip-vit-large-patch14-336 \\
    --pretrain_mm_mlp_adapter mm_projector.safetensors --version v1 --image photo.jpg --prompt "Where is this?"
  torchrun --nproc-per-node 2 tools/generate.py --tensor-model-parallel-size 2 --load runs/stage2 \\
    --data_path questions.json --image_folder images --answers answers.jsonl
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    from dc_megatron.inference.flags import add_flag, add_model_flags

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", metavar="TEXT", help="the question")
    add_flag(parser, "data_path", default="", metavar="FILE", help="many questions: the first message of each record")
    add_flag(parser, "image_folder", default="", metavar="DIR", help="where the pictures of --data_path lie")
    parser.add_argument("--answers", default="", metavar="FILE", help="JSON lines: id, question, expected, answer")
    add_flag(parser, "max_new_tokens", type=int, default=64, metavar="N", help="default: 64")
    add_flag(parser, "batch_size", type=int, default=64, metavar="N", help="questions asked at once (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_flags(parser)
    options = parser.parse_args(argv)
    if bool(options.prompt) == bool(options.data_path):
        parser.error("give --prompt TEXT, or --data_path FILE with many questions")
    if options.data_path and not options.answers:
        parser.error("--data_path needs --answers FILE")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from dc_megatron.errors import UserError

    try:
        from dc_megatron.inference.ask import ask_file, ask_once
        from dc_megatron.inference.flags import source_of

        if options.data_path:
            summary = ask_file(
                source_of(options),
                options.data_path,
                options.image_folder,
                options.answers,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                image_backend=options.image_backend,
            )
            shown = f"{summary['questions']} questions, {summary['exact']} answered as expected; {options.answers}"
        else:
            summary = ask_once(
                source_of(options), options.prompt, options.image, options.max_new_tokens, options.image_backend
            )
            shown = summary["answer"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary) if options.json else shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
