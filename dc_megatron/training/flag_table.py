"""The flags of this program: one row each, with LLaVA's names, Megatron's names and what happens to the value.

Every flag may be written in snake_case or in kebab-case. A row is the only place that knows a flag: the parser
(``argv.py``), the help page (``flag_help.py``) and the collision list of the tests all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dc_megatron.config import (
    CONNECTOR_TYPES,
    IMAGE_ASPECT_RATIOS,
    MERGE_TYPES,
    PACKINGS,
    PROJECTOR_TYPES,
    TEMPLATES,
)

AVAILABLE = "available"
NOT_YET = "not available yet"
NO_MEANING = "no meaning here"

MODEL, DATA, TRAINING, OPTIMIZER, OUTPUT, VALIDATION, PARALLEL, OTHER = (
    "Model",
    "Data",
    "What is trained, and for how long",
    "Optimizer",
    "Output",
    "Validation during training",
    "Parallelism (Megatron's names)",
    "LLaVA's flags that do nothing here or cannot be used yet",
)


@dataclass(frozen=True)
class Flag:
    """One flag.

    ``engine`` is Megatron's option of the same meaning: it is accepted as another name. With ``handed_on`` the value
    is passed to Megatron under that name just as it is; otherwise ``arguments.py`` computes what Megatron gets.
    ``refused`` maps a value to the reason why that one value is refused.
    """

    name: str
    type: type
    default: str | int | float | bool | tuple | None
    help: str
    group: str
    engine: str | None = None
    handed_on: bool = False
    choices: tuple[str, ...] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    # One or more words; the value is a tuple of them.
    many: bool = False
    status: str = AVAILABLE
    # The values that are accepted without a word for a flag that is not available: they ask for what happens anyway.
    neutral: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def _no_meaning(name: str, text: str, type: type = str, engine: str | None = None) -> Flag:
    return Flag(name, type, None, text, OTHER, engine=engine, status=NO_MEANING)


def _not_yet(name: str, text: str, type: type = str, neutral: tuple[str, ...] = ()) -> Flag:
    return Flag(name, type, None, text, OTHER, status=NOT_YET, neutral=neutral)


_MODEL = (
    Flag(
        "model_name_or_path",
        str,
        "",
        "folder of the Hugging Face language model; its config.json sets the shape",
        MODEL,
    ),
    Flag("vision_tower", str, "", "folder of the Hugging Face tower (CLIP, SigLIP, ...)", MODEL),
    Flag("mm_dense_connector_type", str, "dci", "dense connector; none is plain LLaVA", MODEL, choices=CONNECTOR_TYPES),
    Flag("mm_projector_type", str, "mlp2x_gelu", "projector behind the connector", MODEL, choices=PROJECTOR_TYPES),
    Flag("mm_vision_select_layer", int, -2, "hidden state of the final feature (CLIP; SigLIP has its own)", MODEL),
    Flag(
        "mm_vision_select_feature",
        str,
        "patch",
        "tokens of the tower that are used",
        MODEL,
        choices=("patch", "cls_patch"),
        refused={"cls_patch": "not available yet; use patch"},
    ),
    Flag("pretrain_mm_mlp_adapter", str, "", "projector file to start from (mm_projector.bin or .safetensors)", MODEL),
)

_DATA = (
    Flag(
        "data_path",
        str,
        (),
        "LLaVA-format JSON or JSONL files, each with :WEIGHT if not 1, or one YAML file; not Megatron's --data-path",
        DATA,
        many=True,
    ),
    Flag(
        "image_folder",
        str,
        (),
        "where the pictures' names start: a folder, tar shards or an address; one for all files or one for each",
        DATA,
        many=True,
    ),
    Flag("version", str, "", "conversation template", DATA, choices=TEMPLATES),
    Flag(
        "image_aspect_ratio",
        str,
        "square",
        "how a picture is brought to the tower's size; anyres: whole, and in tiles of its best resolution",
        DATA,
        choices=IMAGE_ASPECT_RATIOS,
    ),
    Flag(
        "image_grid_pinpoints",
        str,
        "",
        "resolutions (width, height) of anyres, multiples of the tower's (default: LLaVA-1.6's 1x2, 2x1, 2x2, 3x1, 1x3"
        ' tiles, for 336 pixels "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]")',
        DATA,
    ),
    Flag(
        "mm_patch_merge_type",
        str,
        "",
        "how anyres joins tiles (default: spatial_unpad; with sti, and without anyres, flat)",
        DATA,
        choices=MERGE_TYPES,
    ),
    Flag("model_max_length", int, 2048, "longest sample in tokens, pictures included; longer ones are cut", DATA),
    Flag(
        "seq-length",
        int,
        None,
        "length of a packed row (default: 4096, or model_max_length if longer); unpacked rows are never longer",
        DATA,
        engine="--seq-length",
    ),
    Flag(
        "packing",
        str,
        "best-fit",
        "samples side by side in rows of one length, or one a row, padded to the longest of the micro-batch",
        DATA,
        choices=PACKINGS,
    ),
    Flag(
        "group_by_modality_length",
        bool,
        False,
        "LLaVA's order for unpacked rows: batches of one modality and alike lengths; implies --packing none",
        DATA,
    ),
    Flag("video-frames", int, 8, "frames taken from a video, evenly spread", DATA),
    Flag("data-order", str, "shuffled", "order of the samples of an epoch", DATA, choices=("shuffled", "sequential")),
    Flag("image-backend", str, "auto", "what decodes pictures", DATA, choices=("auto", "dali", "pil")),
    Flag(
        "image-decode-device",
        str,
        "cpu",
        "where DALI decodes; gpu takes the GPU of every process that decodes",
        DATA,
        choices=("cpu", "gpu"),
    ),
    Flag("max-bad-sample-rate", float, 0.001, "stop when more than this share of the records is faulty", DATA),
    Flag("index-folder", str, "", "where the index of the data is kept (default: OUTPUT/index)", DATA),
    Flag(
        "dataloader_num_workers",
        int,
        2,
        "threads of a process that decode pictures",
        DATA,
        engine="--num-workers",
        handed_on=True,
    ),
    Flag("seed", int, 1234, "seed of data order and initialisation", DATA, engine="--seed", handed_on=True),
)

_TRAINING = (
    Flag(
        "trainable",
        str,
        "connector,llm",
        "parts that learn: connector[,llm][,vision_tower], or connector,lora",
        TRAINING,
    ),
    Flag("tune_mm_mlp_adapter", bool, False, "True is --trainable connector", TRAINING),
    Flag("freeze_backbone", bool, False, "True is --trainable connector", TRAINING),
    Flag("unfreeze_mm_vision_tower", bool, False, "True adds vision_tower to the parts that learn", TRAINING),
    Flag("num_train_epochs", float, 1.0, "passes over the data", TRAINING),
    Flag("max_steps", int, None, "optimizer steps; takes precedence over epochs", TRAINING, engine="--train-iters"),
    Flag(
        "per_device_train_batch_size",
        int,
        8,
        "samples per device and accumulation step; with packing only the product counts: samples a step on average",
        TRAINING,
    ),
    Flag("gradient_accumulation_steps", int, 1, "accumulation steps", TRAINING),
    Flag("global-batch-size", int, None, "rows of one optimizer step", TRAINING, engine="--global-batch-size"),
    Flag("micro-batch-size", int, None, "rows of one forward pass", TRAINING, engine="--micro-batch-size"),
    Flag(
        "loss-reduction",
        str,
        "token",
        "mean over the supervised tokens of the global batch, or of each micro-batch as LLaVA does",
        TRAINING,
        choices=("token", "microbatch"),
    ),
    Flag("gradient_checkpointing", bool, False, "recompute every layer's activations in the backward pass", TRAINING),
    Flag(
        "recompute",
        str,
        "none",
        "activations computed again in the backward pass: those of the MLPs (selective), all (full, as"
        " --gradient_checkpointing True), or as few as let the run fit into the GPU by an estimate (auto)",
        TRAINING,
        choices=("none", "selective", "full", "auto"),
    ),
    Flag("bf16", bool, False, "compute in bfloat16", TRAINING, engine="--bf16", handed_on=True),
    Flag("fp16", bool, False, "compute in float16 with loss scaling", TRAINING, engine="--fp16", handed_on=True),
    Flag(
        "fp8-format",
        str,
        None,
        "the language model's linear layers in FP8 (beside --bf16; needs Transformer Engine); hybrid: E4M3 forward,"
        " E5M2 for gradients",
        TRAINING,
        engine="--fp8-format",
        choices=("hybrid", "e4m3"),
    ),
    Flag(
        "fp8-recipe",
        str,
        "delayed",
        "how FP8 values are scaled: by the past, by the present tensor, by blocks of it; mxfp8 needs Blackwell",
        TRAINING,
        engine="--fp8-recipe",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    ),
    Flag(
        "fp8-check-interval",
        int,
        100,
        "steps between comparisons of the FP8 loss with that of a bf16 pass over the same rows; 0: none",
        TRAINING,
    ),
)

_LORA = (
    Flag(
        "lora_enable",
        bool,
        False,
        "adapters on all linears of the language model but its head; they and the connector learn",
        TRAINING,
    ),
    Flag("lora_r", int, 64, "rank of the adapters; the original's recipes have 128", TRAINING),
    Flag("lora_alpha", int, 16, "the update is multiplied by alpha / r; the original's recipes have 256", TRAINING),
    Flag("lora_dropout", float, 0.05, "share of an adapter's inputs that is dropped", TRAINING),
    Flag(
        "lora_weight_path",
        str,
        "",
        "folder of a PEFT adapter to start from (default: A random, B zero, as PEFT)",
        TRAINING,
    ),
    Flag(
        "lora_bias",
        str,
        "none",
        "biases that learn along",
        TRAINING,
        choices=("none", "all", "lora_only"),
        refused=dict.fromkeys(("all", "lora_only"), "not available; biases stay frozen, use none"),
    ),
)

_OPTIMIZER = (
    Flag("learning_rate", float, 5e-5, "peak learning rate", OPTIMIZER, engine="--lr", handed_on=True),
    Flag("mm_projector_lr", float, None, "peak of the connector, if not learning_rate; the same schedule", OPTIMIZER),
    Flag("vision_tower_lr", float, None, "peak of a vision tower that learns, likewise", OPTIMIZER),
    Flag("min-lr", float, 0.0, "learning rate that the schedule ends at", OPTIMIZER, engine="--min-lr", handed_on=True),
    Flag(
        "lr_scheduler_type",
        str,
        "linear",
        "shape of the schedule after warm-up; constant has no warm-up",
        OPTIMIZER,
        engine="--lr-decay-style",
        choices=("cosine", "linear", "constant", "constant_with_warmup", "inverse-square-root", "WSD"),
    ),
    Flag(
        "warmup_ratio",
        float,
        0.0,
        "warm-up steps = ceil(ratio x steps), the first at learning rate 0",
        OPTIMIZER,
        engine="--lr-warmup-fraction",
    ),
    Flag("warmup_steps", int, 0, "warm-up steps; above 0 it replaces the ratio", OPTIMIZER, engine="--lr-warmup-iters"),
    Flag("weight_decay", float, 0.0, "skips biases and norms", OPTIMIZER, engine="--weight-decay", handed_on=True),
    Flag("adam_beta1", float, 0.9, "first moment's decay", OPTIMIZER, engine="--adam-beta1", handed_on=True),
    Flag("adam_beta2", float, 0.999, "second moment's decay", OPTIMIZER, engine="--adam-beta2", handed_on=True),
    Flag("adam_epsilon", float, 1e-8, "added to the denominator", OPTIMIZER, engine="--adam-eps", handed_on=True),
    Flag("max_grad_norm", float, 1.0, "gradient norm clip; 0 is off", OPTIMIZER, engine="--clip-grad", handed_on=True),
)

_OUTPUT = (
    Flag("output_dir", str, "", "checkpoints, projector, metrics and TensorBoard files", OUTPUT, engine="--save"),
    Flag(
        "load",
        str,
        "",
        "checkpoint folder to start from; a checkpoint in --output_dir comes first",
        OUTPUT,
        engine="--load",
        handed_on=True,
    ),
    Flag(
        "verify-checkpoint",
        bool,
        False,
        "read all files of the checkpoint that is loaded and compare their hashes first (Megatron's --verify-integrity"
        " hashes again, on one rank, and needs to have been given when it was saved)",
        OUTPUT,
    ),
    Flag("save_steps", int, 500, "steps between checkpoints", OUTPUT, engine="--save-interval"),
    Flag(
        "save_strategy",
        str,
        "steps",
        "no: save at the end only",
        OUTPUT,
        choices=("steps", "no", "epoch"),
        refused={"epoch": "not available yet; use steps with --save_steps, or no"},
    ),
    Flag("logging_steps", int, 1, "steps between log lines", OUTPUT, engine="--log-interval", handed_on=True),
    Flag(
        "report_to",
        str,
        "tensorboard",
        "where curves go besides metrics.jsonl",
        OUTPUT,
        choices=("tensorboard", "none", "wandb"),
        refused={
            "wandb": "not available yet; use tensorboard or none (Megatron's own --wandb-project and --wandb-exp-name"
            " work where wandb is installed)"
        },
    ),
    Flag(
        "logging_dir", str, "", "TensorBoard folder (default: OUTPUT/tensorboard)", OUTPUT, engine="--tensorboard-dir"
    ),
    Flag(
        "log-images",
        int,
        4,
        "pictures in TensorBoard with the model's words, at every checkpoint and evaluation",
        OUTPUT,
    ),
    Flag(
        "dry-run",
        bool,
        False,
        "build every distinct rank of the job without memory, weights, data or GPU, check and count it, and stop;"
        " a known model's name may stand where its folder is not there",
        OUTPUT,
    ),
)

_EPOCH = {"epoch": "not available yet; use steps with --eval_steps, or no"}
_VALIDATION = (
    Flag(
        "eval_data_path",
        str,
        (),
        "held-out LLaVA-format files; their mean loss is taken every --eval_steps steps, and at the end",
        VALIDATION,
        many=True,
    ),
    Flag(
        "eval_image_folder",
        str,
        (),
        "where the names of their pictures start (default: as --image_folder)",
        VALIDATION,
        many=True,
    ),
    Flag(
        "evaluation_strategy",
        str,
        None,
        "no: never (default: steps, where --eval_data_path is given)",
        VALIDATION,
        choices=("steps", "no", "epoch"),
        refused=_EPOCH,
    ),
    Flag(
        "eval_strategy",
        str,
        None,
        "the newer name of --evaluation_strategy",
        VALIDATION,
        choices=("steps", "no", "epoch"),
        refused=_EPOCH,
    ),
    Flag("eval_steps", int, 500, "steps between evaluations", VALIDATION, engine="--eval-interval"),
    Flag(
        "eval-iters",
        int,
        None,
        "at most so many global batches of the validation rows, the first ones (default: all; 0: no evaluation)",
        VALIDATION,
        engine="--eval-iters",
    ),
)

_PARALLEL = (
    Flag(
        "tensor-model-parallel-size",
        int,
        1,
        "processes that share each layer",
        PARALLEL,
        engine="--tensor-model-parallel-size",
        handed_on=True,
    ),
    Flag(
        "pipeline-model-parallel-size",
        int,
        1,
        "stages that the layers are spread over",
        PARALLEL,
        engine="--pipeline-model-parallel-size",
        handed_on=True,
    ),
    Flag(
        "context-parallel-size",
        int,
        1,
        "processes that share the positions of each packed row, for rows that are too long for one",
        PARALLEL,
        engine="--context-parallel-size",
        handed_on=True,
    ),
    Flag(
        "pipeline-split",
        str,
        "even",
        "layers of the pipeline stages: as many each, or so that the slowest stage, tower and head included, is as fast"
        " as can be (auto)",
        PARALLEL,
        choices=("even", "auto"),
    ),
    Flag(
        "vision-tower-stages",
        str,
        "first",
        "who encodes the images: the first stage, a micro-batch at a time, or the ranks of all stages, those of a whole"
        " step before its pipeline begins",
        PARALLEL,
        choices=("first", "all"),
    ),
    Flag(
        "sequence-parallel",
        bool,
        False,
        "spread norms over the sequence as well",
        PARALLEL,
        engine="--sequence-parallel",
        handed_on=True,
    ),
)

_OTHER = (
    _no_meaning(
        "deepspeed", "Megatron's engine trains here; --use-distributed-optimizer is ZeRO-1, --use-megatron-fsdp ZeRO-3"
    ),
    _no_meaning("per_device_eval_batch_size", "validation rows go in batches of the training's size", int),
    _no_meaning("lazy_preprocess", "samples are always prepared as they are needed", bool),
    _no_meaning("tf32", "PyTorch's own setting holds for float32 products", bool),
    _no_meaning("save_total_limit", "every checkpoint is kept", int),
    _no_meaning("is_multimodal", "a sample with a picture is recognised by its image field", bool),
    _no_meaning("remove_unused_columns", "only the fields of the LLaVA format are read", bool),
    _no_meaning("cache_dir", "models are read from the folders that are named"),
    _no_meaning("run_name", "the folder of --output_dir names the run"),
    _no_meaning("attn_implementation", "tools/doctor.py says which attention is chosen and why"),
    _no_meaning("local_rank", "torchrun says so in the environment", int, engine="--local-rank"),
    _no_meaning(
        "overwrite_output_dir",
        "a run resumes from the newest checkpoint of --output_dir; empty the folder to start over",
        bool,
    ),
    _no_meaning("double_quant", "there is no quantised training", bool),
    _no_meaning("quant_type", "there is no quantised training"),
    _not_yet("mm_use_im_start_end", "pictures are not framed by tokens", bool, ("False",)),
    _not_yet("mm_use_im_patch_token", "pictures need no token of their own", bool, ("False",)),
    _not_yet("freeze_mm_mlp_adapter", "the connector always learns", bool, ("False",)),
    _not_yet("bits", "there is no quantised training", int, ("16",)),
    _not_yet("optim", "AdamW is the optimizer", neutral=("adamw_torch", "adamw_torch_fused")),
    _not_yet(
        "resume_from_checkpoint",
        "a run resumes from --output_dir by itself; --load DIR names another folder",
        neutral=("False",),
    ),
)

FLAGS: tuple[Flag, ...] = (
    *_MODEL,
    *_DATA,
    *_TRAINING,
    *_LORA,
    *_OPTIMIZER,
    *_OUTPUT,
    *_VALIDATION,
    *_PARALLEL,
    *_OTHER,
)


def flags_by_key() -> dict[str, Flag]:
    """Every name a flag of ours answers to, in snake_case without dashes: its own and Megatron's."""
    table = {}
    for flag in FLAGS:
        names = [flag.key] + ([flag.engine[2:].replace("-", "_")] if flag.engine else [])
        for name in dict.fromkeys(names):
            assert name not in table, f"two rows of the flag table answer to --{name}"
            table[name] = flag
    return table
