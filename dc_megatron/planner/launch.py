"""A plan as the command that starts it: the environment variables and flags of the recipes in ``examples/``."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from dc_megatron.planner.job import PRECISIONS, Job
from dc_megatron.planner.search import Plan


@dataclass(frozen=True)
class Launch:
    """environment: variables that the recipe reads. flags: behind the recipe, where they count last."""

    environment: tuple[tuple[str, str], ...]
    recipe: str
    flags: tuple[str, ...]

    def words(self) -> list[str]:
        return [*(f"{name}={value}" for name, value in self.environment), "bash", self.recipe, *self.flags]

    def text(self) -> str:
        """Over several lines, for a shell."""
        sizes = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment)
        lines = [f"  {sizes} \\", f"    bash {self.recipe}"]
        if self.flags:
            lines[-1] += " \\"
            lines.append(f"    {shlex.join(self.flags)}")
        return "\n".join(lines)


def launch_of(job: Job, plan: Plan, stage: str, model: str, vision: str, template: str) -> Launch:
    """stage: pretrain, finetune or lora. model, vision: folders. template: of stage 2, "" for the recipe's own."""
    choice, per_node = plan.choice, min(job.per_node, job.gpus)
    environment = {
        "NNODES": job.gpus // per_node,
        "GPUS_PER_NODE": per_node,
        "TENSOR_PARALLEL": choice.tensor,
        "PIPELINE_PARALLEL": choice.pipeline,
        "MODEL": model,
        "VISION_TOWER": vision,
        "CONNECTOR": job.model.connector.dense_connector_type,
        "GLOBAL_BATCH_SIZE": job.samples_per_step,
        "MODEL_MAX_LENGTH": job.max_length,
        "GRADIENT_CHECKPOINTING": "False",
    }
    run = f"runs/{os.path.basename(os.path.normpath(model))}-{environment['CONNECTOR']}"
    environment["OUTPUT"] = f"{run}-{stage}"
    if stage != "pretrain":
        environment["PROJECTOR"] = f"{run}-pretrain"
    if environment["NNODES"] == 1:
        del environment["NNODES"]
    if job.packed:
        environment["SEQ_LENGTH"] = choice.row_length
    else:
        environment |= {"PACKING": "none", "PER_DEVICE_TRAIN_BATCH_SIZE": job.samples_per_step // job.gpus}
    if stage != "pretrain" and template:
        environment["VERSION"] = template
    if stage == "lora":
        environment["LORA"] = "True"
    if choice.precision == "fp16":
        environment["BF16"] = "False"
    recipe = "examples/pretrain_dc.sh" if stage == "pretrain" else "examples/finetune_dc.sh"
    pairs = tuple((name, str(value)) for name, value in environment.items())
    return Launch(pairs, recipe, tuple(_flags(job, plan, stage)))


def _flags(job: Job, plan: Plan, stage: str) -> list[str]:
    choice, words = plan.choice, list(plan.split.words)
    if choice.virtual > 1 and "--pipeline-model-parallel-layout" not in words:
        words += ["--num-virtual-stages-per-pipeline-rank", str(choice.virtual)]
    if not job.packed:
        words += ["--micro-batch-size", str(choice.rows)]
    words += plan.recompute.words
    # What the recipe's own BF16 says already is not said again.
    asked = PRECISIONS[choice.precision].flags
    words += asked[2:] if asked[:2] in (("--bf16", "True"), ("--bf16", "False")) else asked
    if stage == "pretrain" and choice.tensor > 1:
        words.append("--sequence-parallel")
    if stage == "finetune" and not choice.sharded:
        words += ["--use-distributed-optimizer", "False"]
    if stage != "finetune" and choice.sharded and plan.data > 1:
        words.append("--use-distributed-optimizer")
    if stage == "lora":
        rank = job.model.lora_rank
        words += ["--lora_r", str(rank), "--lora_alpha", str(2 * rank)]
    return words
