"""Megatron flags that depend on the data, on the number of processes, on the model and on what is installed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from dc_megatron.config import LanguageConfig, check_parallel_layout
from dc_megatron.errors import UserError
from dc_megatron.training.argv import Translation
from dc_megatron.training.context_flags import context_argv, row_multiple, why_multiple
from dc_megatron.training.engine_flags import engine_flags
from dc_megatron.training.fsdp_flags import asks_for_fsdp, fsdp_words
from dc_megatron.training.settings import RunSettings


@dataclass(frozen=True)
class StepPlan:
    """Sizes of the batches in rows (one sample each while packing is none) and the number of steps."""

    data_parallel_size: int
    micro_batch_size: int
    global_batch_size: int
    accumulation_steps: int
    seq_length: int
    train_iters: int
    warmup_iters: int
    decay_iters: int
    save_interval: int
    notes: tuple[str, ...]
    # Global batches of an evaluation; 0: there is none.
    eval_iters: int = 0
    context_parallel_size: int = 1

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, over which gradients and optimizer are spread: context-parallel ones as well."""
        return self.data_parallel_size * self.context_parallel_size


def plan_steps(
    settings: RunSettings, num_rows: int | None, world_size: int, mean_length: float | None = None
) -> StepPlan:
    """Resolve batch sizes, row length, steps and warm-up for ``world_size`` processes.

    ``num_rows`` is the number of rows in all epochs of the run (see ``row_plan``), None where --max_steps is given.
    ``mean_length``: positions of a sample on average, which packing needs where the batch is given in samples.
    Steps: ceil(rows / global batch); the last batch is filled up from the next epoch.
    Raises UserError for sizes that do not fit each other.
    """
    data_parallel = _data_parallel_size(settings, world_size)
    notes: list[str] = []
    seq_length = row_length(settings, notes)
    if settings.packing == "none":
        micro, global_batch = _batch_sizes(settings, world_size, data_parallel)
        notes.append(
            f"{global_batch} samples a step ({micro} x {global_batch // (micro * data_parallel)} x {data_parallel})"
        )
    else:
        micro, global_batch = 1, _packed_batch(settings, world_size, data_parallel, seq_length, mean_length, notes)
    steps = settings.max_steps
    if steps is None:
        if not num_rows:
            raise UserError(f"--data_path {' '.join(settings.data_path)}: there are no samples to train on")
        steps = math.ceil(num_rows / global_batch)
    warmup = _warmup_steps(settings, steps, notes)
    return StepPlan(
        data_parallel_size=data_parallel,
        micro_batch_size=micro,
        global_batch_size=global_batch,
        accumulation_steps=global_batch // (micro * data_parallel),
        seq_length=seq_length,
        train_iters=steps,
        warmup_iters=warmup,
        # The scheduler insists on warm-up < decay. In a run that is all warm-up the decay is never reached.
        decay_iters=max(steps, warmup + 1),
        save_interval=settings.save_steps if settings.save_strategy == "steps" else steps,
        notes=tuple(notes),
        context_parallel_size=settings.context_parallel_size,
    )


def _packed_batch(
    settings: RunSettings,
    world_size: int,
    data_parallel: int,
    seq_length: int,
    mean_length: float | None,
    notes: list[str],
) -> int:
    """Rows of a global batch whose rows are packed: given, or as many as LLaVA's number of samples fills."""
    samples = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    given = settings.global_batch_size
    if given:
        if given % data_parallel:
            raise UserError(
                f"--global-batch-size {given} (rows): not divisible by {data_parallel} data-parallel ranks; use"
                f" {max(1, round(given / data_parallel)) * data_parallel}"
            )
        if {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(settings.given):
            notes.append(f"--global-batch-size {given} counts, not the {samples} samples of LLaVA's batch flags")
        return given
    # Known before the data only as far as errors go: one row each.
    rows = samples * mean_length / seq_length if mean_length else data_parallel
    rounded = max(1, round(rows / data_parallel)) * data_parallel
    if mean_length:
        notes.append(
            f"{rounded} rows of {seq_length} a step ({rounded // data_parallel} x {data_parallel}) for {samples}"
            f" samples of {mean_length:.0f} positions on average"
        )
    return rounded


def _data_parallel_size(settings: RunSettings, world_size: int) -> int:
    tensor, pipeline = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    context = settings.context_parallel_size
    model = tensor * pipeline * context
    if world_size % model:
        divided = f" x --context-parallel-size {context}" if context > 1 else ""
        raise UserError(
            f"{world_size} processes cannot be divided into groups of --tensor-model-parallel-size {tensor} x"
            f" --pipeline-model-parallel-size {pipeline}{divided} = {model}; start a multiple of {model} processes or"
            " change the sizes"
        )
    return world_size // model


def _batch_sizes(settings: RunSettings, world_size: int, data_parallel: int) -> tuple[int, int]:
    """Micro and global batch. LLaVA's names count samples per device: global = per device x accumulation x devices,
    whatever the tensor parallel size, so that recipes keep their meaning."""
    per_device, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    product = per_device * accumulation * world_size
    sum_up = (
        f"--per_device_train_batch_size {per_device} x --gradient_accumulation_steps {accumulation} x {world_size}"
        f" processes = {product}"
    )
    named = {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(settings.given)
    global_batch = settings.global_batch_size or product
    if named and global_batch != product:
        raise UserError(f"--global-batch-size {global_batch} contradicts {sum_up}; give one of the two")
    micro = settings.micro_batch_size or per_device
    if global_batch % (micro * data_parallel):
        fits = [m for m in range(1, global_batch + 1) if global_batch % (m * data_parallel) == 0]
        what = f"--global-batch-size {global_batch}" if not named else f"{sum_up} (the global batch)"
        advice = f"micro batch sizes that do: {', '.join(map(str, fits))}" if fits else "raise the global batch"
        raise UserError(
            f"{what} is not divisible by the micro batch {micro} x {data_parallel} data-parallel ranks ="
            f" {micro * data_parallel}; {advice}"
        )
    return micro, global_batch


# Long enough to be filled well by samples of LLaVA's lengths.
_PACKED_LENGTH = 4096


def row_length(settings: RunSettings, notes: list[str]) -> int:
    """Row length, of which all tensor- and context-parallel ranks that divide rows take equal parts."""
    length = settings.seq_length or settings.model_max_length
    if settings.packing != "none" and not settings.seq_length:
        length = max(_PACKED_LENGTH, settings.model_max_length)
    multiple = row_multiple(settings)
    rounded = math.ceil(length / multiple) * multiple
    if rounded != length:
        if settings.seq_length:
            raise UserError(f"--seq-length {length}: {why_multiple(settings)}; use {rounded}")
        notes.append(f"--seq-length {rounded}: {length}, rounded up: {why_multiple(settings)}")
    return rounded


def _warmup_steps(settings: RunSettings, steps: int, notes: list[str]) -> int:
    """As Hugging Face's schedules: steps given win over a ratio, a ratio is rounded up, constant has none.

    Megatron's scheduler then gives step k (from 0) the rate lr x k / warm-up up to k = warm-up and lr x decay after
    it, which is the same function, the first step at 0 included (megatron-core optimizer_param_scheduler.py).
    """
    if settings.lr_scheduler_type == "constant":
        if settings.warmup_ratio or settings.warmup_steps:
            notes.append("--lr_scheduler_type constant has no warm-up; constant_with_warmup has")
        return 0
    if settings.warmup_steps:
        if "warmup_ratio" in settings.given:
            notes.append(f"--warmup_steps {settings.warmup_steps} replaces --warmup_ratio {settings.warmup_ratio}")
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * steps)


def finish(settings: RunSettings, plan: StepPlan) -> list[str]:
    """Megatron's flags for batches, steps, schedule and checkpoints."""
    style = "constant" if settings.lr_scheduler_type == "constant_with_warmup" else settings.lr_scheduler_type
    words = ["--micro-batch-size", plan.micro_batch_size, "--global-batch-size", plan.global_batch_size]
    words += ["--seq-length", plan.seq_length, "--train-iters", plan.train_iters]
    words += ["--lr-decay-style", style, "--lr-warmup-iters", plan.warmup_iters, "--lr-decay-iters", plan.decay_iters]
    words += ["--optimizer", "adam", "--dataloader-type", "external", "--eval-iters", plan.eval_iters]
    # Without an evaluation the interval is unused, but the engine divides by it.
    words += ["--eval-interval", settings.eval_steps if plan.eval_iters else plan.train_iters]
    # SIGTERM is what torchrun sends when another rank died; a wish to stop is told apart from it.
    words += ["--exit-signal-handler", "--exit-signal", "SIGUSR1", "--no-one-logger"]
    if settings.output_dir:
        words += ["--save", settings.output_dir, "--save-interval", plan.save_interval]
    # The optimizer's part can then be read back under another tensor and pipeline split.
    words += ["--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]
    if settings.load:
        words.append("--exit-on-missing-checkpoint")  # without it the engine trains from random weights
    return [str(word) for word in words]


def megatron_shape_argv(
    language: LanguageConfig, settings: RunSettings, seq_length: int, typed: list[str] = ()
) -> list[str]:
    """The shape of the language model as Megatron's flags, from its config.json.

    ``typed`` is ``Translation.megatron_argv``: a shape flag in it that contradicts the config is a UserError, and so
    are tensor and pipeline parallel sizes that do not divide the model.
    """
    check_parallel_layout(
        language,
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.uneven_pipeline,
    )
    rows = _shape(language, seq_length)
    for name, values in typed_options(typed).items():
        if name in rows and name not in _LARGER_IS_FINE and not _same(values, rows[name]):
            raise UserError(
                f"{' '.join([name, *values])} contradicts config.json of {language.path or 'the model'}, which says"
                f" {' '.join(rows[name]) or 'it is on'}; leave the flag out"
            )
        if name in _OTHER_SHAPES and name not in rows:
            raise UserError(
                f"{' '.join([name, *values])}: not the shape that config.json of {language.path or 'the model'}"
                " describes; leave the flag out"
            )
    _refuse_lost_norm(language, typed)
    return [word for name, values in rows.items() for word in (name, *values)]


def _refuse_lost_norm(language: LanguageConfig, typed: list[str]) -> None:
    if language.parallel_layers and "layernorm" in typed_options(typed).get("--recompute-modules", []):
        raise UserError(
            "--recompute-modules layernorm: a layer of model_type phi reads its norm twice, so its output cannot be"
            " thrown away in between; name other modules (mlp, core_attn)"
        )


_LARGER_IS_FINE = (
    "--max-position-embeddings",
    "--make-vocab-size-divisible-by",
    "--hidden-dropout",
    "--attention-dropout",
)
# Flags that change what is computed and that no config asks for, or not this one's.
_OTHER_SHAPES = (
    "--group-query-attention",
    "--num-query-groups",
    "--untie-embeddings-and-output-weights",
    "--use-rope-scaling",
    "--rope-scaling-factor",
    "--add-qkv-bias",
    "--qk-layernorm",
    "--swiglu",
    "--disable-bias-linear",
    "--squared-relu",
    "--quick-geglu",
    "--openai-gelu",
    "--rotary-interleaved",
    "--rotary-seq-len-interpolation-factor",
    "--no-position-embedding",
    "--apply-layernorm-1p",
    "--apply-residual-connection-post-layernorm",
    "--window-size",
    "--padded-vocab-size",
)


def typed_options(words: Iterable[str]) -> dict[str, list[str]]:
    """Megatron's words as option -> its values."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and word[2:].replace("-", "_") in engine_flags():
            name = word
            options[name] = []
        else:
            options[name].append(word)
    return options


def _same(typed: list[str], ours: list[str]) -> bool:
    try:
        return [float(t) for t in typed] == [float(o) for o in ours]
    except ValueError:
        return typed == ours


def _shape(language: LanguageConfig, seq_length: int) -> dict[str, list[str]]:
    """Megatron option -> its values. Megatron derives other values where some of these are left out."""
    if language.rope_theta != int(language.rope_theta):
        raise UserError(
            f"{language.path}: config.json says rope_theta {language.rope_theta}; Megatron's --rotary-base takes whole"
            " numbers only"
        )
    # Rotary positions have no table that ends: the engine only checks that the number is not below the row length.
    positions = max(language.max_position_embeddings, seq_length)
    rows: dict[str, object] = {
        "--num-layers": language.num_hidden_layers,
        "--hidden-size": language.hidden_size,
        "--ffn-hidden-size": language.intermediate_size,
        "--num-attention-heads": language.num_attention_heads,
        "--kv-channels": language.head_dim,
        "--normalization": "LayerNorm" if language.layer_norm else "RMSNorm",
        "--norm-epsilon": language.rms_norm_eps,
        "--position-embedding-type": "rope",
        "--rotary-base": int(language.rope_theta),
        "--rotary-percent": language.rotary_percent,
        "--max-position-embeddings": positions,
        "--vocab-size": language.vocab_size,
        "--make-vocab-size-divisible-by": 128,
        "--tokenizer-type": "NullTokenizer",  # ids come from our data room; the engine wants only their number
        "--hidden-dropout": 0.0,
        "--attention-dropout": 0.0,
    }
    if language.num_key_value_heads != language.num_attention_heads:
        rows |= {"--group-query-attention": None, "--num-query-groups": language.num_key_value_heads}
    # Without --swiglu Megatron's MLP is two linears around GELU; the model's builder sees to its tanh form.
    switches = {
        "--swiglu": language.gated_mlp,
        "--disable-bias-linear": not language.linear_bias,
        "--add-qkv-bias": language.qkv_bias,
        "--qk-layernorm": language.qk_norm,
    }
    rows |= {name: None for name, on in switches.items() if on}
    if not language.tie_word_embeddings:
        rows["--untie-embeddings-and-output-weights"] = None
    if language.rope_scaling_factor is not None:
        rows |= {"--use-rope-scaling": None, "--rope-scaling-factor": language.rope_scaling_factor}
    return {name: [] if value is None else [str(value)] for name, value in rows.items()}


def backend_argv(cuda: bool, transformer_engine: bool, apex: bool) -> list[str]:
    """Megatron's flags for what this machine has; Transformer Engine and apex count only beside a GPU."""
    transformer_engine, apex = transformer_engine and cuda, apex and cuda
    words = ["--distributed-backend", "nccl" if cuda else "gloo"]
    words += ["--transformer-impl", "transformer_engine" if transformer_engine else "local"]
    if not transformer_engine:
        # The fused rotary embedding and the persistent norm belong to Transformer Engine and apex; our attention on
        # torch's scaled_dot_product_attention has no softmax of its own to fuse.
        words += ["--no-rope-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"]
    if not (apex or transformer_engine):
        words += ["--no-gradient-accumulation-fusion"]  # the engine stops where apex's kernel is asked for and absent
    if not cuda:
        words += ["--no-bias-gelu-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"]
    return words


def sharding_argv(translation: Translation, replicas: int, cuda: bool) -> list[str]:
    """Megatron's flags that spread the optimizer of stage 2 over the ``replicas``, unless they were typed.

    Of stage 2: where the language model learns, or adapters to it.

    At any number of ranks, so that a run can go on with another. On GPUs gradients travel while others are computed;
    parameters do as well where no pictures are logged, which ask a model whose parameters are all there.
    """
    settings, typed = translation.settings, {*translation.megatron_argv, *translation.switched_off}
    fsdp = asks_for_fsdp(typed)
    stage_2 = {"llm", "lora"} & {*settings.trainable}
    if not (fsdp or stage_2) or "--use-distributed-optimizer" in translation.switched_off:
        return []
    words = ["--use-distributed-optimizer"]
    if cuda and replicas > 1:
        words.append("--overlap-grad-reduce")
        if (fsdp or not settings.log_images) and "--overlap-grad-reduce" not in translation.switched_off:
            words.append("--overlap-param-gather")
    return [word for word in words if word not in typed]


def async_save_argv(typed: list[str], cuda: bool) -> list[str]:
    """What --async-save takes in Megatron: without the first word it is switched off, and so is the second's default.

    UserError: a strategy that cannot work here.
    """
    options = typed_options(typed)
    if "--async-save" not in options:
        return []
    strategy = options.get("--async-strategy", ["mcore"])
    if strategy == ["nvrx"] and not (cuda and find_spec("nvidia_resiliency_ext")):
        lacks = "the package nvidia-resiliency-ext, which is not installed" if cuda else "a GPU"
        raise UserError(f"--async-strategy nvrx: needs {lacks}; leave it out: Megatron's own way of saving is taken")
    return ["--use-persistent-ckpt-worker", "--async-strategy", *strategy]


def engine_argv(translation: Translation, language: LanguageConfig, plan: StepPlan, backend: list[str]) -> list[str]:
    """All words for Megatron's parser: ``backend_argv(...)``, shape, batches and steps, and last what was typed."""
    settings = translation.settings
    return [
        *backend,
        *context_argv(settings, backend),
        *megatron_shape_argv(language, settings, plan.seq_length, translation.megatron_argv),
        *finish(settings, plan),
        *sharding_argv(translation, plan.replicas, "nccl" in backend),
        *async_save_argv(translation.megatron_argv, "nccl" in backend),
        *fsdp_words(translation.megatron_argv, "nccl" in backend),
        *translation.megatron_argv,
    ]
