"""From the words on the command line to the settings of a run and the flags that Megatron's parser gets.

Megatron's parser never sees a flag of ours: names collide (``--data-path``, ``--bf16 True``), and a mistyped flag
should be refused in a tenth of a second, not after the engine was imported. Nothing here imports torch or Megatron.

How a word is read: every flag may be written in snake_case or kebab-case and as ``--flag value`` or ``--flag=value``;
switches may carry True or False; abbreviations are refused, as Megatron refuses them; of a flag given twice the last
one counts, whichever of its names was used, so that launchers can be overridden by later flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dc_megatron.config import nearest
from dc_megatron.errors import UserError
from dc_megatron.training.context_flags import refuse_impossible_context
from dc_megatron.training.engine_flags import EngineFlag, check_engine_flag, engine_flags, spelling_of
from dc_megatron.training.flag_table import AVAILABLE, FLAGS, NO_MEANING, NOT_YET, Flag, flags_by_key
from dc_megatron.training.fp8_flags import fp8_words, refuse_impossible_fp8
from dc_megatron.training.fsdp_flags import refuse_impossible_fsdp
from dc_megatron.training.layout_flags import UNEVEN_PIPELINE, recompute_argv, refuse_contradicted_layout
from dc_megatron.training.lora_flags import refuse_impossible_lora
from dc_megatron.training.part_flags import refuse_contradicted_rates, trained_parts
from dc_megatron.training.settings import RunSettings

REQUIRED_FOR_TRAINING = ("model_name_or_path", "vision_tower", "data_path", "version")
_TRUE_FALSE = {"true": True, "false": False}


@dataclass(frozen=True)
class Translation:
    """``settings`` for this program, ``megatron_argv`` for Megatron's parser, ``notes`` to print once.

    ``megatron_argv`` lacks what depends on the data, the number of processes and the model's config.json: see
    ``arguments.engine_argv``.
    """

    settings: RunSettings
    megatron_argv: list[str]
    notes: list[str]
    # Megatron's switches that were typed with False: defaults of ours give way to them.
    switched_off: frozenset[str] = frozenset()


@dataclass
class _Reading:
    """What was read so far: values of our flags by field name, and the engine's flags in order."""

    values: dict[str, object] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    engine: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    switched_off: set[str] = field(default_factory=set)


def translate(argv: list[str], required: tuple[str, ...] = ()) -> Translation:
    """Read ``argv`` (without the program's name). ``required`` names settings that must not be empty.

    Raises UserError: unknown flag, missing or wrong value, a flag that is not available yet, a contradiction.
    """
    reading = _Reading()
    position = 0
    while position < len(argv):
        position = _read_flag(argv, position, reading)
    values = {f.key: reading.values.get(f.key, f.default) for f in FLAGS if f.status == AVAILABLE}
    for name in required:
        if not values[name]:
            raise UserError(f"--{name} is missing{_hint(name)}")
    values["trainable"] = trained_parts(reading.values)
    _refuse_contradictions(reading, values)
    settings = RunSettings(
        **values,
        uneven_pipeline=values["pipeline_split"] == "auto" or any(name in reading.engine for name in UNEVEN_PIPELINE),
        given=tuple(reading.values),
    )
    return Translation(settings, _engine_words(reading, settings), reading.notes, frozenset(reading.switched_off))


def _hint(name: str) -> str:
    flag = flags_by_key()[name]
    return f": {flag.help}" + (f" ({', '.join(flag.choices)})" if flag.choices else "")


def _read_flag(argv: list[str], position: int, reading: _Reading) -> int:
    """Read the flag at ``position`` with its values into ``reading``; returns the position after them."""
    word = argv[position]
    if not word.startswith("--") or word == "--":
        before = f" after {argv[position - 1]}" if position else ""
        raise UserError(f"{word}: a value without a flag{before}; flags start with --, see --help")
    name, equals, attached = word.partition("=")
    key = name[2:].replace("-", "_")
    following = [attached] if equals else _words_until_next_flag(argv, position + 1)
    if key in flags_by_key():
        used = _read_ours(flags_by_key()[key], name, key, following, reading)
    elif key in engine_flags():
        used = _read_engine(engine_flags()[key], key, following, reading)
    else:
        known = [f"--{f.name}" for f in FLAGS] + [s for f in engine_flags().values() for s in f.spellings]
        raise UserError(f"{name}: unknown flag{nearest(name, known)}; --help lists the flags")
    if equals and used == 0:
        raise UserError(f"{word}: {name} takes no value")
    return position + 1 + (0 if equals else used)


def _words_until_next_flag(argv: list[str], start: int) -> list[str]:
    end = start
    while end < len(argv) and not argv[end].startswith("--"):
        end += 1
    return argv[start:end]


def _read_ours(flag: Flag, name: str, key: str, following: list[str], reading: _Reading) -> int:
    """Values used: 0 for a switch alone, all of a flag that takes many, else 1."""
    if flag.type is bool and not (following and following[0].lower() in _TRUE_FALSE):
        text, used = "True", 0
    elif following:
        used = len(following) if flag.many else 1
        text = " ".join(following[:used])
    else:
        raise UserError(f"{name}: a value is missing{_choices(flag)}")
    if flag.status == NO_MEANING:
        reading.notes.append(f"{name} {text}: no meaning here: {flag.help}")
    elif flag.status == NOT_YET:
        if text not in flag.neutral:
            raise UserError(f"{name} {text}: not available yet: {flag.help}")
    else:
        field_name = flag.key
        value = tuple(following) if flag.many else _value(flag, name, text)
        if key == "lr_decay_style" and value == "constant":
            value = "constant_with_warmup"  # Megatron's constant keeps the warm-up, Hugging Face's has none
        reading.values[field_name] = value
        reading.spelled[field_name] = name
    return used


def _choices(flag: Flag) -> str:
    return f"; one of: {', '.join(flag.choices)}" if flag.choices else ""


def _value(flag: Flag, name: str, text: str):
    """``text`` as the flag's type; UserError for a wrong type or a value that is not allowed."""
    if flag.type is bool:
        return _TRUE_FALSE[text.lower()]
    if text in flag.refused:
        raise UserError(f"{name} {text}: {flag.refused[text]}")
    if flag.choices and text not in flag.choices:
        raise UserError(f"{name} {text}: unknown{nearest(text, flag.choices)}{_choices(flag)}")
    try:
        value = flag.type(text)
    except ValueError:
        raise UserError(f"{name} {text}: not a {'whole number' if flag.type is int else 'number'}") from None
    return None if flag.name == "max_steps" and value == -1 else value  # -1 is Hugging Face's "count epochs"


def _read_engine(flag: EngineFlag, key: str, following: list[str], reading: _Reading) -> int:
    spelling = spelling_of(flag, key)
    if flag.arity == "0":
        used = 1 if following and following[0].lower() in _TRUE_FALSE else 0
        if used and following[0].lower() == "false":
            for one in flag.spellings:
                reading.engine.pop(one, None)
            reading.switched_off.update(flag.spellings)
            return used
        reading.switched_off.difference_update(flag.spellings)
        values = []
    else:
        values = {"1": following[:1], "3": following[:3]}.get(flag.arity, following)
        missing = (flag.arity in ("1", "+") and not values) or (flag.arity == "3" and len(values) < 3)
        if missing:
            raise UserError(
                f"{spelling}: a value is missing" + (f"; one of: {', '.join(flag.choices)}" * bool(flag.choices))
            )
        used = len(values)
    check_engine_flag(flag, spelling, values)
    for one in flag.spellings:
        reading.engine.pop(one, None)
    reading.engine[spelling] = values
    return used


def _refuse_contradictions(reading: _Reading, values: dict) -> None:
    if values["bf16"] and values["fp16"]:
        raise UserError("--bf16 and --fp16 are both True; choose one")
    if values["seq_length"] is not None and values["model_max_length"] > values["seq_length"]:
        if "model_max_length" in reading.values:
            raise UserError(
                f"--model_max_length {values['model_max_length']}: longer than --seq-length {values['seq_length']};"
                " raise --seq-length or lower --model_max_length"
            )
        values["model_max_length"] = values["seq_length"]
        reading.notes.append(f"--model_max_length {values['seq_length']}: as long as --seq-length")
    _settle_packing(reading, values)
    _refuse_impossible_evaluation(reading, values)
    _refuse_decoding(values)
    refuse_impossible_fp8(values, set(reading.values))
    refuse_impossible_lora(values, set(reading.values))
    refuse_impossible_fsdp(values, reading.engine, reading.switched_off)
    refuse_contradicted_layout(values, set(reading.values), reading.engine)
    refuse_contradicted_rates(values, reading.engine)
    refuse_impossible_context(values, set(reading.values))
    if values["min_lr"] > values["learning_rate"]:
        raise UserError(f"--min-lr {values['min_lr']}: above --learning_rate {values['learning_rate']}")
    for name in _POSITIVE:
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"{reading.spelled.get(name, '--' + name)} {values[name]}: must be above 0")
    for name in _NOT_NEGATIVE:
        if values[name] < 0:
            raise UserError(f"{reading.spelled.get(name, '--' + name)} {values[name]}: must not be negative")
    if not 0 <= values["warmup_ratio"] <= 1:
        raise UserError(f"{reading.spelled['warmup_ratio']} {values['warmup_ratio']}: must be from 0 to 1")


def _refuse_decoding(values: dict) -> None:
    if values["image_decode_device"] == "gpu" and values["image_backend"] == "pil":
        raise UserError("--image-decode-device gpu contradicts --image-backend pil, which decodes on the CPU; drop one")


def _refuse_impossible_evaluation(reading: _Reading, values: dict) -> None:
    strategies = [name for name in ("evaluation_strategy", "eval_strategy") if values[name] is not None]
    if len({values[name] for name in strategies}) > 1:
        raise UserError("--evaluation_strategy and --eval_strategy are two names of one flag and differ; give one")
    for name in strategies:
        if values["eval_data_path"] and values[name] == "no":
            raise UserError(f"--{name} no contradicts --eval_data_path; leave one of them out, or say steps")
    if values["eval_iters"] is not None and values["eval_iters"] < 0:
        raise UserError(f"--eval-iters {values['eval_iters']}: must not be negative")
    asks = [f"--{name} steps" for name in strategies if values[name] == "steps"]
    asks += [reading.spelled[name] for name in ("eval_steps", "eval_image_folder") if name in reading.values]
    asks += ["--eval-iters"] if values["eval_iters"] else []
    if asks and not values["eval_data_path"]:
        # LLaVA's launch lines have --eval_steps beside a strategy of no.
        if not any(values[name] == "no" for name in strategies):
            raise UserError(f"{asks[0]}: nothing to evaluate on; give held-out records: --eval_data_path FILE")
        reading.notes.append(f"{', '.join(asks)}: nothing is evaluated under a strategy of no")


def _settle_packing(reading: _Reading, values: dict) -> None:
    """LLaVA's grouping of unpacked rows turns packing off; flags that count samples in a row do not go with it."""
    if values["group_by_modality_length"] and values["packing"] != "none":
        if "packing" in reading.values:
            raise UserError(
                "--group_by_modality_length True contradicts --packing best-fit, whose rows are all full; give one"
            )
        values["packing"] = "none"
        reading.notes.append(
            "--packing none: --group_by_modality_length True orders rows of one sample each; packing is faster"
        )
    if values["group_by_modality_length"] and values["data_order"] == "sequential":
        raise UserError("--group_by_modality_length True contradicts --data-order sequential; give one")
    micro = values["micro_batch_size"]
    if values["packing"] != "none" and micro not in (None, 1):
        raise UserError(
            f"{reading.spelled['micro_batch_size']} {micro}: with --packing best-fit a micro-batch is one row; use"
            " --seq-length for longer rows, or --packing none"
        )


_POSITIVE = (
    "model_max_length",
    "seq_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "micro_batch_size",
    "video_frames",
    "save_steps",
    "logging_steps",
    "eval_steps",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "min_lr",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_bad_sample_rate",
    "dataloader_num_workers",
    "log_images",
    "fp8_check_interval",
)


def _engine_words(reading: _Reading, settings: RunSettings) -> list[str]:
    """What Megatron gets of our flags as they are, then the engine's own flags as they were typed."""
    words: list[str] = []
    for flag in FLAGS:
        value = getattr(settings, flag.key) if flag.handed_on else None
        if flag.type is bool:
            words += [flag.engine] if value else []
        elif value not in (None, ""):
            words += [flag.engine, str(value)]
    words += fp8_words(settings, reading.engine)
    if settings.loss_reduction == "token":
        words.append("--calculate-per-token-loss")
    words += recompute_argv(settings, reading.engine, reading.notes)
    tensorboard = settings.logging_dir or (settings.output_dir and f"{settings.output_dir.rstrip('/')}/tensorboard")
    if settings.report_to == "tensorboard" and tensorboard:
        words += ["--tensorboard-dir", tensorboard]
    for spelling, values in reading.engine.items():
        words += [spelling, *values]
    return words
