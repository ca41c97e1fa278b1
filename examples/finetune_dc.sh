#!/usr/bin/env bash
""":"
# Stage 2: the connector and the whole language model learn, from conversations. Vicuna-7B, CLIP-L/336, Dense
# Channel Integration, and the original's recipe: global batch 128, learning rate 2e-5, one epoch, starting from the
# projector that stage 1 wrote. With LORA=True the connector and adapters on the language model: r 128, alpha 256,
# learning rate 2e-4, the connector's 2e-5.
#
#   bash examples/finetune_dc.sh [flags]
#   torchrun --nproc-per-node 8 examples/finetune_dc.sh [flags]
#   PROJECTOR=... DATA=... bash examples/finetune_dc.sh --max_steps 10
#   PRESET=llama3-8b DATASET=mini-gemini bash examples/finetune_dc.sh
#
# Everything written in capitals below can be set from the environment, and flags given last count.
# defaults.sh has what depends on PRESET and DATASET, launch.sh says how processes are counted. This file is valid bash and valid Python: see its last lines.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
if [ "${LORA:-False}" = True ]; then
  divide "$division_few"
  learning_rate=2e-4
  LEARNING_FLAGS=(--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5)
  run_kind=lora
else
  divide "$division_all"
  learning_rate=2e-5
  LEARNING_FLAGS=(--trainable "${TRAINABLE:-connector,llm}")
  run_kind=finetune
fi

MODEL_FLAGS=(
  --model_name_or_path "${MODEL:-$model_folder}"
  --vision_tower "${VISION_TOWER:-checkpoints/clip-vit-large-patch14-336}"
  --mm_dense_connector_type "${CONNECTOR:-dci}"
  --mm_projector_type mlp2x_gelu
  --mm_vision_select_layer -2
  --pretrain_mm_mlp_adapter "${PROJECTOR:-runs/$run_name-pretrain/mm_projector.safetensors}"
)
DATA_FLAGS=(
  --version "${VERSION:-$model_template}"
  --data_path "${DATA:-$conversations}"
  --image_folder "${IMAGE_FOLDER:-$conversation_images}"
  --image_aspect_ratio "${IMAGE_ASPECT_RATIO:-pad}"
  --model_max_length "${MODEL_MAX_LENGTH:-2048}"
  --packing "${PACKING:-best-fit}"
  --dataloader_num_workers "${WORKERS:-4}"
)
if [ -n "${SEQ_LENGTH:-}" ]; then DATA_FLAGS+=(--seq-length "$SEQ_LENGTH"); fi
batch_flags "${GLOBAL_BATCH_SIZE:-128}" 16
RECIPE_FLAGS=(
  --num_train_epochs "${EPOCHS:-1}"
  --learning_rate "${LEARNING_RATE:-$learning_rate}"
  --lr_scheduler_type cosine
  --warmup_ratio 0.03
  --weight_decay 0
  --bf16 "${BF16:-True}"
  --fp16 "${FP16:-False}"
  --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}"
)
OUTPUT_FLAGS=(
  --output_dir "${OUTPUT:-runs/$run_name-$run_kind}"
  --save_steps "${SAVE_STEPS:-500}"
  --logging_steps 1
)
PARALLEL_FLAGS=(
  --tensor-model-parallel-size "$tensor_parallel"
  --pipeline-model-parallel-size "$pipeline_parallel"
  --sequence-parallel
  --use-distributed-optimizer
)
launch "${MODEL_FLAGS[@]}" "${LEARNING_FLAGS[@]}" "${DATA_FLAGS[@]}" "${BATCH_FLAGS[@]}" "${RECIPE_FLAGS[@]}" \
  "${OUTPUT_FLAGS[@]}" "${PARALLEL_FLAGS[@]}" "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
