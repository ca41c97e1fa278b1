#!/usr/bin/env python
"""Hugging Face, LLaVA and llava-hf folders to Megatron checkpoints and back; one process, no GPU, bounded memory."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

EXAMPLE = """\
examples:
  python tools/convert.py import --hf vicuna-7b-v1.5 --vision-tower clip-vit-large-patch14-336 --save vicuna-7b-megatron
  python tools/convert.py export --load runs/stage2 --format hf-llava --save my-model
  python tools/convert.py verify runs/stage2 my-model
"""
FORMATS = ("hf", "llava", "hf-llava")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export,verify}")
    _add_import(_command(commands, "import", "a folder of weights into a checkpoint that --load takes at any layout"))
    _add_export(_command(commands, "export", "a checkpoint into a folder that transformers, vLLM or LLaVA reads"))
    _add_verify(_command(commands, "verify", "compare two folders of any kind, bit by bit"))
    return parser.parse_args(argv)


def _command(commands, name: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=what,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _flag(parser: argparse.ArgumentParser, name: str, **settings) -> None:
    """A flag in both spellings, ``--vision-tower`` and ``--vision_tower``."""
    spellings = dict.fromkeys((f"--{name}", "--" + name.replace("-", "_")))
    parser.add_argument(*spellings, dest=name.replace("-", "_"), **settings)


def _add_import(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "hf", required=True, metavar="DIR", help="text model, LLaVA / DenseConnector or llava-hf folder")
    _flag(parser, "save", required=True, metavar="DIR", help="new folder; give it to --load")
    _flag(parser, "vision-tower", default="", metavar="DIR", help="the tower's folder, where DIR holds none")
    _flag(parser, "projector", default="", metavar="FILE", help="mm_projector file to begin with")
    _flag(
        parser,
        "mm-dense-connector-type",
        default="",
        metavar="TYPE",
        help="sti, sci, dci or none; needed where the folder or the projector does not say",
    )
    _flag(parser, "version", default="", metavar="NAME", help="conversation template to note, such as v1")
    _flag(parser, "image-aspect-ratio", default="", metavar="HOW", help="square or pad, to note")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "load", required=True, metavar="DIR", help="--output_dir of training, or an imported checkpoint")
    _flag(parser, "format", required=True, metavar="|".join(FORMATS), help="text model, LLaVA, or stock llava-hf")
    _flag(parser, "save", required=True, metavar="DIR", help="new folder")
    _flag(parser, "step", type=int, metavar="N", help="iteration (default: the newest complete one)")
    _flag(parser, "dtype", default="", metavar="bf16|fp16|fp32", help="default: as stored")
    _flag(parser, "vision-tower", default="", metavar="DIR", help="where the frozen tower lies, if it moved")
    _flag(parser, "vision-tower-name", default="", metavar="NAME", help="llava: what config.json calls the tower")
    _flag(
        parser,
        "with-modeling-code",
        action="store_true",
        help="hf-llava, sti only: put a short modelling file into the folder; it then needs trust_remote_code",
    )
    _flag(parser, "version", default="", metavar="NAME", help="hf-llava: template, where the checkpoint has none")
    _flag(
        parser,
        "no-check",
        action="store_true",
        help="compare no hashes of the checkpoint's files and tower",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="checkpoint or folder")
    parser.add_argument("b", metavar="B", help="checkpoint or folder")
    _flag(parser, "step", type=int, metavar="N", help="iteration (default: the newest complete one)")
    _flag(parser, "vision-tower", default="", metavar="DIR", help="where the frozen tower lies, if it moved")
    _flag(parser, "any-dtype", action="store_true", help="cast A to the dtype of B before comparing")
    _flag(
        parser,
        "logits",
        action="store_true",
        help="also run both models in fp32, on the GPU where there is one, and compare logits of seeded words and,"
        " where both can see, of words around a picture; they are loaded one after the other, not at once, and each"
        " must fit into memory in fp32. Exit status 1 where they differ by more than 2e-5 x the largest logit (16"
        " roundings of the coarser dtype x the largest logit where one side's weights were rounded)",
    )


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from dc_megatron.errors import UserError

    try:
        return {"import": run_import, "export": run_export, "verify": run_verify}[options.command](options)
    except UserError as error:
        return _complain(f"error: {error}", 2)
    except OSError as error:
        return _complain(f"error: {error}; when that is mended, {_AGAIN[options.command]}", 2)
    except KeyboardInterrupt:
        return _complain(f"interrupted; {_AGAIN[options.command]}", 130)


_GOES_ON = "the same command goes on where it stopped"
_AGAIN = {"import": _GOES_ON, "export": _GOES_ON, "verify": "give the command again"}


def _complain(message: str, status: int) -> int:
    """Say it on a line of its own, which on a terminal is the one that showed the progress."""
    print("\r\x1b[K" * sys.stderr.isatty() + message, file=sys.stderr)
    return status


def run_import(options: argparse.Namespace) -> int:
    from dc_megatron.weights.importer import import_checkpoint

    result = import_checkpoint(
        options.hf,
        options.save,
        vision_tower=options.vision_tower,
        projector=options.projector,
        dense_connector_type=options.mm_dense_connector_type,
        version=options.version,
        image_aspect_ratio=options.image_aspect_ratio,
    )
    return _say_converted(result, options.json, f"train with {_train_with(options.save)}")


def _train_with(save: str) -> str:
    return shlex.join(["--model_name_or_path", os.path.join(save, "hf"), "--load", save])


def run_export(options: argparse.Namespace) -> int:
    from dc_megatron.errors import UserError
    from dc_megatron.weights.exporter import export_checkpoint

    for value, flag, only in (
        (options.vision_tower_name, "--vision-tower-name", "llava"),
        (options.with_modeling_code, "--with-modeling-code", "hf-llava"),
        (options.version, "--version", "hf-llava"),
    ):
        if value and options.format != only:
            raise UserError(f"{flag}: --format {only} alone has a place for it; leave it out for {options.format}")
    processor = None
    if options.format == "hf-llava":
        from dc_megatron.inference.exported_processor import ExportedProcessor

        processor = ExportedProcessor(options.version)
    result = export_checkpoint(
        options.load,
        options.format,
        options.save,
        step=options.step,
        dtype=options.dtype,
        vision_tower=options.vision_tower,
        tower_name=options.vision_tower_name,
        modeling_code=options.with_modeling_code,
        check=not options.no_check,
        processor=processor,
    )
    words = ["verify", options.load, options.save, *(["--any-dtype"] if options.dtype else [])]
    words += [] if options.step is None else ["--step", str(options.step)]
    words += ["--vision-tower", options.vision_tower] if options.vision_tower else []
    return _say_converted(result, options.json, f"compare with: tools/convert.py {shlex.join(words)}")


def _say_converted(result, as_json: bool, advice: str) -> int:
    if as_json:
        entry = {"folder": result.folder, "tensors": result.tensors, "bytes": result.num_bytes}
        print(json.dumps({**entry, "seconds": round(result.seconds, 3), "notes": result.notes}))
        return 0
    for note in result.notes:
        print(f"note: {note}")
    rate = result.num_bytes / max(result.seconds, 1e-6) / 1e9
    print(
        f"{result.folder}: {result.tensors} tensors, {result.num_bytes / 1e9:.2f} GB in {result.seconds:.1f} s"
        f" ({rate:.2f} GB/s); {advice}"
    )
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from dc_megatron.weights.verify import verify

    result = verify(
        options.a, options.b, step=options.step, vision_tower=options.vision_tower, any_dtype=options.any_dtype
    )
    entry = {
        "equal": result.equal,
        "tensors": result.tensors,
        "bytes": result.num_bytes,
        "differences": result.differences,
        "notes": result.notes,
    }
    logits = None
    if options.logits:
        from dc_megatron.evaluation.logits import compare_logits

        logits = compare_logits(options.a, options.b, step=options.step, vision_tower=options.vision_tower)
        entry |= logits.as_entries()
    equal = result.equal and (logits is None or logits.equal)
    if options.json:
        print(json.dumps(entry))
        return 0 if equal else 1
    for note in result.notes + (logits.notes if logits else []):
        print(f"note: {note}")
    for line in result.differences[:20]:
        print(line)
    if len(result.differences) > 20:
        print(f"... and {len(result.differences) - 20} more")
    for line in logits.lines() if logits else []:
        print(line)
    verdict = "equal" if result.equal else f"{len(result.differences)} differences"
    print(f"{result.tensors} tensors, {result.num_bytes / 1e9:.2f} GB compared: {verdict}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
