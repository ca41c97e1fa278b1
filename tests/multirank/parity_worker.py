"""What the ranks of a parity test do: build the sharded model, run megatron-core's schedule, hand the tensors back."""

from __future__ import annotations

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, dealt_tiles, padded_vocab_size
from dc_megatron.inference.assemble import build_model, global_name, load_language_model, load_vision_tower
from dc_megatron.model.language_model import Layout, transformer_config
from dc_megatron.runtime import parallel
from dc_megatron.training.forward_step import make_forward_step
from dc_megatron.training.parameter_groups import group_overrides
from tests.multirank.job import Job


def share_pixels(batch: dict, rank: int, size: int) -> dict:
    """The batch as the data room delivers it to one of the ranks that share it: with its share of the pixels only."""
    share = -(-batch["num_images"] // size)
    return {**batch, "pixel_values": batch["pixel_values"][rank * share : (rank + 1) * share]}


def deal_pixels(batches: list[dict], dealt_before: int, place: tuple[int, int]) -> list[dict]:
    """The batches as the data room delivers them where their tiles are dealt out."""
    mine = []
    for batch in batches:
        dealt = list(dealt_tiles(batch["num_images"], dealt_before, *place))
        mine.append({**batch, "pixel_values": batch["pixel_values"][dealt]})
        dealt_before += batch["num_images"]
    return mine


def _seed_fault(fault: str | None, model) -> None:
    """Break the model on purpose: the comparison must notice."""
    from dc_megatron.config import LayerTable
    from dc_megatron.model import loss_head

    if fault == "wrong layer index" and model.connector is not None:
        table = model.layer_table
        group = (table.groups[0][0] + 1, *table.groups[0][1:])
        model.layer_table = LayerTable(table.final, (group, *table.groups[1:]))
    elif fault == "unmasked padded column":
        loss_head.mask_padded_columns = lambda logits, vocab_size, group: logits
    elif fault == "tower gradients of one rank" and model.vision_tower is not None:
        for parameter in model.vision_tower.parameters():
            parameter.average_gradients_across_tp_domain = False
    elif fault == "factor not marked for sequence parallelism":
        for parameter in model.lora.parameters():
            parameter.sequence_parallel = False
    elif fault == "missing tensor-parallel reduction":
        loss_head.copy_to_tensor_model_parallel_region = lambda hidden, group=None: hidden


def build(job: Job):
    """The model chunks of this rank, filled from the folders, with the trainable parts set."""
    from megatron.core import parallel_state as mpu

    language = LanguageConfig.from_folder(job.language_folder)
    vision = VisionConfig.from_folder(job.vision_folder)
    connector = ConnectorConfig(job.connector_type)
    layout = Layout(
        job.tensor,
        job.pipeline,
        job.virtual,
        job.sequence_parallel,
        torch.bfloat16 if job.bf16 else torch.float16 if job.fp16 else torch.float32,
        context_parallel_size=job.context,
    )
    config = transformer_config(language, layout)
    config.calculate_per_token_loss = job.loss_reduction == "token"
    if job.recompute == "full":
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    elif job.recompute:
        config.recompute_granularity, config.recompute_modules = job.recompute, ["mlp"]
    rows = padded_vocab_size(language.vocab_size, job.tensor)
    chunks = []
    for stage in range(job.virtual or 1):
        vp_stage = stage if job.virtual else None
        model = build_model(
            language,
            vision,
            connector,
            config,
            vocab_rows=rows,
            max_sequence_length=2048,
            transformer_engine=False,
            seed=1,
            tiling=job.tiling,
            lora=job.lora,
            packed=job.packed,
            tower_on_all_stages=job.tower_stages == "all",
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        load_language_model(model, language, rows)
        load_vision_tower(model, vision, connector)
        if model.connector is not None and job.connector_state:
            _load_connector(model, job.connector_state)
        if job.lora_state:
            model.lora.fill(job.lora_state.__getitem__)
        model.set_trainable(set(job.trainable.split(",")), recompute_tower=job.recompute == "full")
        _seed_fault(job.fault, model)
        chunks.append(model)
    return config, chunks


@torch.no_grad()
def logits(job: Job) -> torch.Tensor:
    """Logits [supervised positions, vocabulary] of the first micro-batch, at one pipeline stage."""
    from megatron.core import parallel_state

    parallel.start(job.tensor)
    _, (model,) = build(job)
    batch = share_pixels(job.micro_batches[0][0], parallel_state.get_tensor_model_parallel_rank(), job.tensor)
    return model.eval()(batch, positions=(batch["labels"].flatten() != -100).nonzero().squeeze(-1))


def _load_connector(model, state: dict) -> None:
    state = dict(state)
    if model.image_newline is not None:
        model.image_newline.data.copy_(state.pop("image_newline"))
    model.connector.load_state_dict(state)


def _named_tensors(chunks: list, of) -> dict:
    """Tensors where ``of`` gives one: the language model's by global name, ``connector.*``, ``image_newline``, and
    ``vision_tower.*`` where that learns.
    """
    found = {}
    for model in chunks:
        for name, parameter in model.language_model.named_parameters():
            if of(parameter) is not None:
                found[global_name(model, name)] = of(parameter).detach().float().clone()
        if model.connector is not None:
            for name, parameter in model.connector.named_parameters():
                if of(parameter) is not None:
                    found[f"connector.{name}"] = of(parameter).detach().float().clone()
        if model.vision_tower is not None and model.vision_tower.learns:
            for name, parameter in model.vision_tower.read_state().items():
                if of(parameter) is not None:
                    found[f"vision_tower.{name}"] = of(parameter).detach().float().clone()
        if model.lora is not None:
            for name, parameter in model.lora.named_parameters():
                if of(parameter) is not None:
                    found[f"lora.{name}"] = of(parameter).detach().float().clone()
        if model.image_newline is not None and of(model.image_newline) is not None:
            found["image_newline"] = of(model.image_newline).detach().float().clone()
    return found


def _gather_reduced_gradients(chunks: list) -> None:
    """Complete the gradient buffers, of which the distributed optimizer has reduced this rank's share only.

    It reads nothing but that share, which stays what it was.
    """
    for chunk in chunks:
        for group in chunk.bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                share = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=ranks)


class _Ahead:
    """Images of whole steps for StepImages, and what the tower and the counting saw of them."""

    def __init__(self, model):
        from dc_megatron.model.dealt_images import dealing_place
        from dc_megatron.training.step_images import StepImages

        self._place = dealing_place(model.pg_collection)
        self._batches, self._dealt = iter(()), 0
        self.encoded, self.samples = [], 0
        model.vision_tower.register_forward_pre_hook(lambda _, inputs: self.encoded.append(inputs[0].shape[0]))
        self.images = StepImages(self, torch.device("cpu"), self._count)

    def give(self, batches: list[dict]) -> None:
        self._batches = iter(deal_pixels(batches, self._dealt, self._place))
        self._dealt += sum(batch["num_images"] for batch in batches)

    def __next__(self) -> dict:
        return next(self._batches)

    def _count(self, counts: dict) -> None:
        self.samples += counts["samples"]


def _start_schedule(optimizer, weight_decay: float) -> None:
    """Learning rates and weight decay of the groups, as the scheduler sets them."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["max_lr"], weight_decay * group["wd_mult"]


def train(job: Job) -> dict:
    """Run ``job`` on this rank: losses by step, first-step gradients and final parameters.

    Gradients are reduced over the data-parallel ranks; both are this rank's tensor and pipeline shards.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import get_model_config

    from dc_megatron.model import loss_head

    untouched, chunked = dict(vars(loss_head)), []
    if job.chunk_bytes is not None:
        loss_head.CHUNK_BYTES = job.chunk_bytes
    loss_head.chunked_loss = lambda rows, *others: chunked.append(len(rows)) or untouched["chunked_loss"](rows, *others)
    parallel.start(job.tensor, job.pipeline, job.virtual, job.context)
    try:
        config, models = build(job)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=job.overlap_grad_reduce,
            use_distributed_optimizer=job.distributed_optimizer,
            overlap_param_gather=job.overlap_param_gather,
            bucket_size=2000 if job.overlap_grad_reduce else None,
        )
        chunks = [Float16Module(config, model) for model in models] if job.bf16 or job.fp16 else models
        chunks = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
        settings = OptimizerConfig(
            optimizer="adam",
            lr=job.lr,
            weight_decay=job.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            clip_grad=1.0,
            bf16=job.bf16,
            fp16=job.fp16,
            initial_loss_scale=job.initial_loss_scale,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=job.distributed_optimizer,
            overlap_param_gather=job.overlap_param_gather,
        )
        optimizer = get_megatron_optimizer(settings, chunks, config_overrides=group_overrides(settings, job.rates))
        _start_schedule(optimizer, job.weight_decay)
        config = get_model_config(chunks[0])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        if job.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = syncs if len(chunks) > 1 else syncs[0]
        forward_step = make_forward_step(torch.device("cpu"), job.loss_reduction)
        data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        tensor_rank = mpu.get_tensor_model_parallel_rank()
        sharing = mpu.get_tensor_and_context_parallel_group()
        ahead = _Ahead(models[0]) if job.tower_stages == "all" else None
        losses, norms, gradients, scales, steps_taken = [], [], {}, [], []
        for number, step in enumerate(job.micro_batches):
            for group in optimizer.param_groups if job.shares else ():
                group["lr"] = group["max_lr"] * job.shares[number]
            for chunk in chunks:
                # As the engine does: the first iteration needs no gathering, later ones gather in forward pre-hooks.
                if job.overlap_param_gather and number == 0:
                    chunk.disable_forward_pre_hook(param_sync=False)
                if job.overlap_param_gather and number == 1:
                    chunk.enable_forward_pre_hook()
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            mine = step[data_rank::data_size]
            if ahead is None:
                mine = [share_pixels(batch, sharing.rank(), sharing.size()) for batch in mine]
            else:
                ahead.give(mine)
                ahead.images.encode(models[0], len(mine))
            iterators = [iter(mine) if ahead is None or chunk else ahead.images for chunk in range(len(chunks))]
            reported = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(mine),
                seq_length=mine[0]["input_ids"].shape[1],
                micro_batch_size=mine[0]["input_ids"].shape[0],
                forward_only=False,
            )
            if number == 0:
                if job.distributed_optimizer:
                    _gather_reduced_gradients(chunks)
                gradients = _named_tensors(models, lambda p: getattr(p, "main_grad", None))
            scales.append(optimizer.get_loss_scale().item())
            taken, norm, _ = optimizer.step()
            steps_taken.append(taken)
            norms.append(norm)
            losses.append(_global_loss(reported))
        if job.overlap_param_gather and len(job.micro_batches) > 1:
            for chunk in chunks:
                chunk.disable_forward_pre_hook()  # gathers what the last step changed
        return {
            "tensor_rank": tensor_rank,
            "pipeline_rank": mpu.get_pipeline_model_parallel_rank(),
            "data_rank": data_rank,
            "context_rank": mpu.get_context_parallel_rank(),
            "losses": losses,
            "grad_norms": norms,
            "loss_scales": scales,
            "steps_taken": steps_taken,
            "chunked_rows": chunked,
            "encoded_tiles": ahead.encoded if ahead is not None else None,
            "samples": ahead.samples if ahead is not None else None,
            "gradients": gradients,
            "parameters": _named_tensors(models, lambda p: p),
        }
    finally:
        vars(loss_head).update(untouched)


def _global_loss(reported: list[dict]) -> float | None:
    """Mean over the supervised tokens of the global batch; None off the last stage."""
    from megatron.core import parallel_state as mpu

    if not reported:
        return None
    total = torch.stack([entry["lm loss"] for entry in reported]).sum(dim=0)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])


def decaying(job: Job) -> dict[str, bool]:
    """Whether weight decay acts on a parameter, by the groups of the optimizer that megatron-core makes."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    parallel.start(1, 1)
    config, models = build(job)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), models[0])
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1)
    optimizer = get_megatron_optimizer(settings, [chunk], config_overrides=group_overrides(settings, job.rates))
    decay = {id(p): group["wd_mult"] > 0 for group in optimizer.param_groups for p in group["params"]}
    return {name: decay[id(parameter)] for name, parameter in models[0].named_parameters() if parameter.requires_grad}
