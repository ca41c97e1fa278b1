#!/usr/bin/env bash
""":"
# Stage 1: only the connector learns, from captions. Vicuna-7B, CLIP-L/336, Dense Channel Integration, and the
# original's recipe: global batch 256, learning rate 1e-3, one epoch.
#
#   bash examples/pretrain_dc.sh [flags]
#   torchrun --nproc-per-node 8 examples/pretrain_dc.sh [flags]
#   MODEL=... DATA=... bash examples/pretrain_dc.sh --max_steps 10
#   PRESET=llama3-70b DATASET=mini-gemini bash examples/pretrain_dc.sh
#
# Everything written in capitals below can be set from the environment, and flags given last count.
# defaults.sh has what depends on PRESET and DATASET, launch.sh says how processes are counted. This file is valid bash and valid Python: see its last lines.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
divide "$division_few"

MODEL_FLAGS=(
  --model_name_or_path "${MODEL:-$model_folder}"
  --vision_tower "${VISION_TOWER:-checkpoints/clip-vit-large-patch14-336}"
  --mm_dense_connector_type "${CONNECTOR:-dci}"
  --mm_projector_type mlp2x_gelu
  --mm_vision_select_layer -2
  --trainable "${TRAINABLE:-connector}"
)
DATA_FLAGS=(
  --version "${VERSION:-plain}"
  --data_path "${DATA:-$captions}"
  --image_folder "${IMAGE_FOLDER:-$caption_images}"
  --image_aspect_ratio "${IMAGE_ASPECT_RATIO:-square}"
  --model_max_length "${MODEL_MAX_LENGTH:-2048}"
  --packing "${PACKING:-best-fit}"
  --dataloader_num_workers "${WORKERS:-4}"
)
if [ -n "${SEQ_LENGTH:-}" ]; then DATA_FLAGS+=(--seq-length "$SEQ_LENGTH"); fi
batch_flags "${GLOBAL_BATCH_SIZE:-256}" 32
RECIPE_FLAGS=(
  --num_train_epochs "${EPOCHS:-1}"
  --learning_rate "${LEARNING_RATE:-1e-3}"
  --lr_scheduler_type cosine
  --warmup_ratio 0.03
  --weight_decay 0
  --bf16 "${BF16:-True}"
  --fp16 "${FP16:-False}"
  --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}"
)
OUTPUT_FLAGS=(
  --output_dir "${OUTPUT:-runs/$run_name-pretrain}"
  --save_steps "${SAVE_STEPS:-500}"
  --logging_steps 1
)
PARALLEL_FLAGS=(
  --tensor-model-parallel-size "$tensor_parallel"
  --pipeline-model-parallel-size "$pipeline_parallel"
)
launch "${MODEL_FLAGS[@]}" "${DATA_FLAGS[@]}" "${BATCH_FLAGS[@]}" "${RECIPE_FLAGS[@]}" "${OUTPUT_FLAGS[@]}" \
  "${PARALLEL_FLAGS[@]}" "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
