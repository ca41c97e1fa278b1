"""One optimizer step of ours: model, schedule, gradient buffers and optimizer as the engine puts them together."""

from __future__ import annotations

import torch

from dc_megatron.benchmark.random_weights import fill_randomly, random_tensor
from dc_megatron.benchmark.section_timer import SectionTimer
from dc_megatron.benchmark.step_variants import Variant
from dc_megatron.benchmark.step_workload import Workload
from dc_megatron.config import padded_vocab_size
from dc_megatron.runtime import device, installed, parallel, patches


class MegatronStep:
    """``run(micro_batches)`` trains one step of ``workload`` as ``variant`` says, on this rank of its processes."""

    def __init__(self, workload: Workload, variant: Variant):
        patches.apply()
        parallel.start(variant.tensor_parallel)
        self._workload, self._variant = workload, variant
        self.device = device.device()
        self.trainable = variant.trainable or workload.trainable
        self.fused = variant.transformer_engine and not variant.plain and installed.usable_transformer_engine()
        self.timer = SectionTimer(device.has_cuda())
        self._chunk, self._optimizer, self.model = self._build()

    @property
    def share(self) -> tuple[int, int]:
        """(rank, size) of the group that shares the pictures."""
        group = self.model.pg_collection.tp
        return group.rank(), group.size()

    def _build(self):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        config, model = self._model()
        lean = self._workload.optimizer == "bf16" and installed.usable_transformer_engine()
        inner = Float16Module(config, model) if config.params_dtype != torch.float32 else model
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=not lean, use_distributed_optimizer=device.has_cuda(), overlap_grad_reduce=False
        )
        chunk = DistributedDataParallel(config, ddp, inner)
        optimizer = get_megatron_optimizer(self._optimizer_config(config, lean), [chunk])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        optimizer.step = self.timer.timed("optimizer", optimizer.step)
        return chunk, optimizer, model

    def _model(self):
        from dc_megatron.benchmark.stock_head import stock_head
        from dc_megatron.inference.assemble import build_model, global_name
        from dc_megatron.model import multimodal_model
        from dc_megatron.model.language_model import Layout, transformer_config
        from dc_megatron.training import forward_step
        from dc_megatron.weights.language_tables import find_rule, language_table
        from dc_megatron.weights.rules import read_shard

        work, variant = self._workload, self._variant
        language, vision, connector = work.language_config, work.vision_config, work.connector_config
        if variant.plain:
            multimodal_model.head = stock_head
        if variant.whole_last_layer:
            # Where nobody says in advance where the targets are, only the head looks for them.
            forward_step.with_places = lambda batch: batch
        layout = Layout(
            tensor_model_parallel_size=variant.tensor_parallel,
            sequence_parallel=variant.tensor_parallel > 1,
            params_dtype=getattr(torch, work.dtype),
            transformer_engine=self.fused,
            fp8_recipe=variant.fp8_recipe,
        )
        config = transformer_config(language, layout)
        config.gradient_accumulation_fusion = self.fused
        if variant.recompute:
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
        rows = padded_vocab_size(language.vocab_size, variant.tensor_parallel)
        model = build_model(
            language,
            vision,
            connector,
            config,
            vocab_rows=rows,
            max_sequence_length=max(work.seq_length, language.max_position_embeddings),
            transformer_engine=self.fused,
            seed=work.seed,
            packed=variant.packed,
        ).to(self.device)
        table, group = language_table(language, rows), model.pg_collection.tp
        shapes = {name: shape for rule in table for name, shape in rule.source_shapes(0).items()}

        def read(name: str, rows, columns):
            generic = ".".join("0" if word.isdigit() else word for word in name.split("."))
            whole = random_tensor(name, shapes[generic], self.device)
            whole = whole if rows is None else whole[slice(*rows)]
            return whole if columns is None else whole[:, slice(*columns)]

        with torch.no_grad():
            for name, parameter in model.language_model.named_parameters():
                rule, layer = find_rule(table, global_name(model, name))
                parameter.copy_(read_shard(rule, layer, group.rank(), group.size(), read))
        fill_randomly(model.vision_tower.model, "vision_tower.")
        fill_randomly(model.connector, "connector.")
        model.set_trainable(set(self.trainable))
        self._time_parts(model, multimodal_model)
        return config, model

    def _time_parts(self, model, multimodal_model) -> None:
        """Tower (forward only), connector and head (both ways) as they run inside the step."""
        timer = self.timer
        model.vision_tower.forward = timer.timed("tower", model.vision_tower.forward)
        project, first = timer.timed("connector", model.connector.forward), model.connector.mlp[0].weight
        model.connector.forward = lambda joined: (
            timer.backward_from("connector", project(joined), first) if first.requires_grad else project(joined)
        )
        head = multimodal_model.head

        def timed_head(*, hidden_states, **others):
            return timer.timed_both_ways("head", hidden_states, lambda states: head(hidden_states=states, **others))

        multimodal_model.head = timed_head

    def _optimizer_config(self, config, lean: bool):
        from megatron.core.optimizer import OptimizerConfig

        lean_types = {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": torch.bfloat16,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
        return OptimizerConfig(
            optimizer="adam",
            lr=self._workload.learning_rate,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            clip_grad=1.0,
            bf16=config.params_dtype == torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=device.has_cuda(),
            **(lean_types if lean else {}),
        )

    def run(self, batches: list[dict]) -> dict:
        """One step over ``batches``; {"loss": mean over the step's targets, "sections": seconds by part}."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from dc_megatron.training.forward_step import LOSS_NAME, make_forward_step

        self._chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=make_forward_step(self.device),
            data_iterator=iter(batches),
            model=self._chunk,
            num_microbatches=len(batches),
            seq_length=batches[0]["input_ids"].shape[1],
            micro_batch_size=batches[0]["input_ids"].shape[0],
            forward_only=False,
        )
        self._optimizer.step()
        total = torch.stack([entry[LOSS_NAME] for entry in reported]).sum(dim=0)
        loss = float(total[0] / total[1])
        if device.has_cuda():
            torch.cuda.synchronize()
        return {"loss": loss, "sections": self.timer.take()}
