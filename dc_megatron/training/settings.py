"""The settings of a run as primitives: what the flags say, defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunSettings:
    """What our flags say, defaults filled in. Only primitives, so that it can be stored in a checkpoint.

    A field carries the name of its row in ``flag_table``, in snake_case; None means "not given, decided later".
    """

    model_name_or_path: str
    vision_tower: str
    mm_dense_connector_type: str
    mm_projector_type: str
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    pretrain_mm_mlp_adapter: str
    # Words of the two flags, as data/sources.py reads them.
    data_path: tuple[str, ...]
    image_folder: tuple[str, ...]
    version: str
    image_aspect_ratio: str
    image_grid_pinpoints: str
    mm_patch_merge_type: str
    model_max_length: int
    seq_length: int | None
    packing: str
    group_by_modality_length: bool
    video_frames: int
    data_order: str
    image_backend: str
    image_decode_device: str
    max_bad_sample_rate: float
    index_folder: str
    dataloader_num_workers: int
    seed: int
    trainable: tuple[str, ...]
    tune_mm_mlp_adapter: bool
    freeze_backbone: bool
    unfreeze_mm_vision_tower: bool
    lora_enable: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_weight_path: str
    lora_bias: str
    num_train_epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int | None
    micro_batch_size: int | None
    loss_reduction: str
    gradient_checkpointing: bool
    recompute: str
    bf16: bool
    fp16: bool
    fp8_format: str | None
    fp8_recipe: str
    fp8_check_interval: int
    learning_rate: float
    mm_projector_lr: float | None
    vision_tower_lr: float | None
    min_lr: float
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    output_dir: str
    load: str
    verify_checkpoint: bool
    save_steps: int
    save_strategy: str
    logging_steps: int
    report_to: str
    logging_dir: str
    log_images: int
    # Words of the two flags, as those of --data_path and --image_folder.
    eval_data_path: tuple[str, ...]
    eval_image_folder: tuple[str, ...]
    evaluation_strategy: str | None
    eval_strategy: str | None
    eval_steps: int
    eval_iters: int | None
    dry_run: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    pipeline_split: str
    vision_tower_stages: str
    sequence_parallel: bool
    # The layers need not divide evenly: the user, or --pipeline-split auto, says how they do.
    uneven_pipeline: bool
    # Names (fields of this class) of the flags that were on the command line.
    given: tuple[str, ...]

    @property
    def recomputes_tower(self) -> bool:
        """Whether a tower that learns computes its blocks again in the backward pass."""
        return "vision_tower" in self.trainable and (self.gradient_checkpointing or self.recompute == "full")

    @property
    def own_rates(self) -> dict[str, float]:
        """Peak learning rate of the parts that learn and do not take ``learning_rate``."""
        rates = {"connector": self.mm_projector_lr, "vision_tower": self.vision_tower_lr}
        return {
            part: rate
            for part, rate in rates.items()
            if part in self.trainable and rate not in (None, self.learning_rate)
        }
