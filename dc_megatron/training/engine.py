"""From a checked command line into Megatron's ``pretrain()``."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace

from dc_megatron.data.index_waiting import build_or_wait
from dc_megatron.errors import UserError
from dc_megatron.runtime import device, installed, patches
from dc_megatron.runtime.kernels import as_line, chosen_kernels, this_machine
from dc_megatron.training import auto_choices, data_plan, run
from dc_megatron.training.arguments import StepPlan, backend_argv, engine_argv
from dc_megatron.training.fp8_band import Fp8Band
from dc_megatron.training.fp8_flags import refuse_unsupported_fp8
from dc_megatron.training.fsdp_flags import asks_for_fsdp, parsed_words
from dc_megatron.training.metrics import Clock, MetricsFile, StepCounts
from dc_megatron.training.optimizer_layout import refuse_other_layout
from dc_megatron.training.resume import refuse_damaged_files, refuse_other_tower_weights
from dc_megatron.training.validation import Validation, open_validation
from dc_megatron.weights.checkpoint_folder import read_description, write_json
from dc_megatron.weights.frozen_base import refuse_another_base
from dc_megatron.weights.language_loading import LanguageWeights
from dc_megatron.weights.peft_files import PeftFactors
from dc_megatron.weights.projector_files import has_newline, read_projector
from dc_megatron.weights.projector_sources import refuse_other_tower
from dc_megatron.weights.staged_iteration import clear_staging
from dc_megatron.weights.torch_dist_tree import TorchDistTree, check_tree
from dc_megatron.weights.tree_tables import TOWER_KEY
from dc_megatron.weights.vision_tables import open_vision_tower


def train(checked: run.Checked) -> None:
    """Run the whole training. Raises UserError for what shows only now: data, weights, flags the engine refuses."""
    _stand_alone()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    _order_of_kernels(checked)
    device.choose_gpu(local_rank)
    device.limit_cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if checked.settings.verify_checkpoint:
        # First: of a damaged file it is the name that helps, not what could not be made of its content.
        refuse_damaged_files(checked.start, rank, world_size)
    notes = _check_weights(checked)
    auto_choices.refuse_impossible_auto(checked.settings, checked.language, checked.translation.megatron_argv)
    refuse_unsupported_fp8(checked.settings, installed.transformer_engine_error(), device.compute_capability())
    if checked.settings.image_decode_device == "gpu" and not device.has_cuda():
        raise UserError("--image-decode-device gpu: there is no GPU here; leave it out")
    config = data_plan.data_config(checked)
    folder = run.index_folder(checked.settings)
    data = data_plan.open_data(
        checked, config, build_or_wait(config, folder, local_rank, progress=_progress(local_rank)), folder, world_size
    )
    validation = open_validation(checked, config, folder, local_rank, data.steps.global_batch_size)
    if validation is not None:
        data = replace(data, steps=replace(data.steps, eval_iters=validation.rows.iterations))
    chosen = auto_choices.choose(checked, data, device.memory_bytes())
    words = _engine_words(checked, data.steps, chosen)
    refuse_other_layout(checked.start, distributed="--use-distributed-optimizer" in words)
    if rank == 0:
        _say_hello(checked, data, [*notes, *chosen.notes])
        if validation is not None:
            _say_validation(checked, validation)
    patches.apply(training=True)
    args = parse(words, checked)
    _pretrain(checked, args, data, validation, words)


def _stand_alone() -> None:
    """A process that nothing launched is a world of one; the engine reads that from the environment."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ:
        # Port 0: any free one, which nobody else has to know.
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }


def _order_of_kernels(checked: run.Checked) -> None:
    """How many queues of kernels CUDA has; it looks at this once, when it starts."""
    if asks_for_fsdp(checked.translation.megatron_argv):
        # The launchers say 1. Weights of the next layer would then wait for the work of this one.
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    else:
        # Megatron's tensor parallelism wants kernels in order of launch; the launchers set it for the others.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _check_weights(checked: run.Checked) -> list[str]:
    """Open whatever weights will be read: headers tell names, shapes and kinds. Returns notes for the user.

    On every rank alike, and before data index and engine: what is wrong is said in seconds. Tensors are not read.
    Megatron executes parts of a checkpoint, so it sees none that was not checked here.
    """
    settings, language = checked.settings, checked.language
    if checked.start.loads:
        check_tree(checked.start.tree)
    if checked.lora and checked.start.loads:
        recorded = read_description(checked.start.folder).language_model_files
        refuse_another_base(language.path, recorded, checked.start.folder)
    if not checked.start.loads or checked.lora:
        LanguageWeights(language.path, language, 0, 1, language.vocab_size)
    if checked.lora and settings.lora_weight_path and not checked.start.loads:
        PeftFactors(settings.lora_weight_path, language, checked.lora)
    refuse_other_tower_weights(checked.start, checked.vision.path, bool(settings.pretrain_mm_mlp_adapter))
    open_vision_tower(checked.vision.path, checked.vision, checked.connector)
    if settings.pretrain_mm_mlp_adapter and not checked.start.resumes:
        read_projector(
            settings.pretrain_mm_mlp_adapter,
            checked.connector,
            checked.vision,
            language.hidden_size,
            newline="optional" if checked.tiling.has_newline else "none",
            type_named=checked.names_connector_type,
        )
        tower_of_the_tree = checked.start.loads and TorchDistTree(checked.start.tree).has(TOWER_KEY)
        refuse_other_tower(settings.pretrain_mm_mlp_adapter, checked.vision.path, trained_here=tower_of_the_tree)
    return _notes_on_newline(checked)


def _notes_on_newline(checked: run.Checked) -> list[str]:
    """LLaVA-1.6's recipe begins AnyRes in stage 2: what stage 1 hands over has no image_newline yet."""
    start, projector = checked.start, checked.settings.pretrain_mm_mlp_adapter
    if not checked.tiling.has_newline or start.resumes or not (projector or start.loads):
        return []
    there = has_newline(projector) if projector else TorchDistTree(start.tree, "--load").has("image_newline")
    return [] if there else [f"{projector or start.tree} has no image_newline, which anyres trains: it starts anew"]


def _engine_words(checked: run.Checked, steps: StepPlan, chosen: auto_choices.Chosen) -> list[str]:
    backend = backend_argv(device.has_cuda(), installed.usable_transformer_engine(), installed.usable_apex())
    translation = checked.translation
    words = engine_argv(translation, checked.language, steps, backend)
    # The engine's own words come last in that list; the start decides which checkpoint they name.
    return words[: len(words) - len(translation.megatron_argv)] + chosen.applied(checked.start.words)


def _progress(local_rank: int):
    """A line that counts records while the index is built, on rank 0 of a node."""
    if local_rank or not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rdata index: {done}/{total} records", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _say_hello(checked: run.Checked, data: data_plan.Data, notes: list[str]) -> None:
    settings, summary, plan = checked.settings, data.index.summary, data.steps
    for note in (*checked.translation.notes, *checked.start.notes, *notes, *plan.notes):
        print(f"note: {note}")
    if not settings.output_dir:
        print("note: --output_dir is missing: nothing of this run will be saved")
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items())) or "none"
    print(f"data: {summary.kept} samples of {summary.records} records (dropped: {dropped}), {summary.images} images")
    length = f"up to {plan.seq_length}"
    if settings.packing != "none":
        length, figures = str(plan.seq_length), data.rows.statistics()
        print(
            f"packing: {figures.rows} rows of {figures.seq_length} positions hold {figures.samples} samples, fill"
            f" {100 * figures.fill:.1f} %; {figures.samples_per_row:.1f} samples and {figures.tiles_mean:.1f}"
            f" ({figures.tiles_min} to {figures.tiles_max}) tiles a row"
        )
    print(
        f"plan: {plan.train_iters} steps of {plan.global_batch_size} rows of {length} positions; warm-up"
        f" {plan.warmup_iters} steps"
    )
    print(
        f"model: {checked.language.model_type} {checked.language.num_hidden_layers} layers x"
        f" {checked.language.hidden_size}, {checked.vision.family} {checked.vision.num_hidden_layers} layers,"
        f" {settings.mm_dense_connector_type}; trained: {', '.join(settings.trainable)}"
    )
    asked = checked.language.residual_dropout
    if asked and "--hidden-dropout" not in checked.translation.megatron_argv:
        print(f"note: config.json says resid_pdrop {asked}; this run has none, --hidden-dropout {asked} drops there")
    rates = [f"{part} {rate:g}" for part, rate in settings.own_rates.items()]
    if rates:
        print(f"learning rates: {', '.join(rates)}; all else {settings.learning_rate:g}; one schedule for all, scaled")
    dtype = "bfloat16" if settings.bf16 else "float16" if settings.fp16 else "float32"
    recipe = settings.fp8_recipe if settings.fp8_format else None
    print(as_line(chosen_kernels(this_machine(), dtype, recipe, settings.context_parallel_size > 1)), flush=True)


def _say_validation(checked: run.Checked, validation: Validation) -> None:
    summary = validation.index.summary
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items())) or "none"
    print(
        f"validation: {summary.kept} samples of {summary.records} records (dropped: {dropped}), every"
        f" {checked.settings.eval_steps} steps and at the end, {validation.rows.iterations} batches",
        flush=True,
    )


def parse(words: list[str], checked: run.Checked):
    """Megatron's arguments. It asserts what it does not like; the words of the assertion are what the user needs.

    The model's config, which the engine makes only later, has doubts of its own.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *words, *parsed_words(words)]
    try:
        args = parse_and_validate_args()
        args.ckpt_format = "torch_dist"
        if checked.settings.packing == "none" and args.pipeline_model_parallel_size > 1:
            _exchange_shapes(args)
        core_transformer_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses these flags: {error or 'see the traceback of its validate_args'}") from error
    for name, value in asdict(checked.settings).items():
        # Only primitives: an object of ours would make the weights-only loading of a checkpoint fail.
        setattr(args, f"dc_{name}", ",".join(value) if isinstance(value, tuple) else value)
    return args


def _exchange_shapes(args) -> None:
    """Unpacked rows are as long as the longest of their micro-batch: pipeline stages tell each other the shape.

    The engine has no flag for it (validate_args sets it), and refuses it beside its default dispatcher of experts, of
    which no model here has any.
    """
    args.variable_seq_lengths = True
    args.moe_token_dispatcher_type = "alltoall"


def _sample_pictures(checked: run.Checked, args, data: data_plan.Data | Validation):
    from dc_megatron.training.sample_pictures import SamplePictures

    count = checked.settings.log_images
    obstacle = None
    if args.virtual_pipeline_model_parallel_size:
        obstacle = "virtual pipeline stages"
    elif args.use_megatron_fsdp:
        obstacle = "--use-megatron-fsdp"
    elif args.overlap_param_gather:
        obstacle = "--overlap-param-gather"
    elif args.context_parallel_size > 1:
        obstacle = "--context-parallel-size"
    if obstacle is None:
        return SamplePictures(checked, data.index, data.config, data.folder, count)
    if "log_images" in checked.settings.given:
        raise UserError(f"--log-images {count}: not available yet with {obstacle}; leave one of them out")
    return None


def _band(checked: run.Checked, args, data: data_plan.Data) -> Fp8Band | None:
    settings = checked.settings
    if settings.fp8_format is None or not settings.fp8_check_interval:
        return None
    if args.pipeline_model_parallel_size > 1:
        if args.rank == 0:
            print("note: --fp8-check-interval: FP8 is not compared with bf16 where there are pipeline stages")
        return None
    first = (args.ckpt_step or 0) if checked.start.resumes else 0
    return Fp8Band(settings.fp8_check_interval, data.steps.accumulation_steps, settings.fp8_recipe, first)


def _session(checked: run.Checked, args, data: data_plan.Data, validation: Validation | None):
    """What the hooks of this run share, on this rank."""
    from dc_megatron.training.session import Session
    from dc_megatron.training.stall_watch import StallWatch

    session = Session(
        checked=checked,
        plan_hash=data.plan_hash,
        images_of_an_epoch=data.index.summary.images,
        dropped_samples=data.index.summary.dropped_samples,
        counts=StepCounts(),
        clock=Clock(),
        stall=StallWatch(args.save or "", args.rank, args.distributed_timeout_minutes),
        loaders=[],
    )
    if args.save and args.rank == args.world_size - 1:
        session.metrics = MetricsFile(args.save, (args.ckpt_step or 0) if checked.start.resumes else 0)
    if checked.settings.log_images and args.tensorboard_dir:
        session.pictures = _sample_pictures(checked, args, validation or data)
    session.consumed_tokens.update(checked.start.consumed_tokens)
    session.band = _band(checked, args, data)
    return session


def _pretrain(
    checked: run.Checked, args, data: data_plan.Data, validation: Validation | None, words: list[str]
) -> None:
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from dc_megatron.training import engine_hooks
    from dc_megatron.training.dataset_provider import make_dataset_provider
    from dc_megatron.training.forward_step import make_forward_step
    from dc_megatron.training.model_provider import make_model_provider
    from dc_megatron.training.step_images import StepImages

    settings = checked.settings
    if args.save and args.rank == 0:
        os.makedirs(args.save, exist_ok=True)
        write_json(os.path.join(args.save, "resolved_config.json"), run.resolved(checked, words))
    session = _session(checked, args, data, validation)
    engine_hooks.install(session)
    add = session.counts.add

    def on_ready() -> None:
        # All ranks have loaded by now: nobody looks at the folder any more to decide what.
        if args.save and args.rank == 0:
            clear_staging(args.save)
        session.stall.alive()
        session.clock.lap()

    def encoded_ahead(loader):
        session.step_images.append(StepImages(loader, device.device(), add))
        return session.step_images[-1]

    ahead = encoded_ahead if settings.vision_tower_stages == "all" else None
    pretrain(
        pretrain_cfg_container_from_args(args),
        make_dataset_provider(data, checked.vision, session.loaders, on_ready, ahead=ahead, validation=validation),
        ModelType.encoder_or_decoder,
        make_forward_step(device.device(), settings.loss_reduction, add, session.band, session.validation_counts.add),
        make_model_provider(checked),
    )
    torch.distributed.barrier()
    session.stall.stop()
    torch.distributed.destroy_process_group()
