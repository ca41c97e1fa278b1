#!/usr/bin/env bash
""":"
# Stage 2 of Llama-3-70B-Instruct in full, without LoRA: 32 or 64 GPUs of 80 GB, tensor parallel 8, pipeline 4.
#
#   NNODES=8 GPUS_PER_NODE=8 NODE_RANK=0..7 MASTER_ADDR=... bash examples/finetune_llama3_70b.sh [flags]
#   sbatch --nodes=8 examples/slurm.sbatch examples/finetune_llama3_70b.sh [flags]
#
# Stage 1: PRESET=llama3-70b bash examples/pretrain_dc.sh, from 8 GPUs on.
set -euo pipefail
export PRESET=llama3-70b
source "$(dirname "${BASH_SOURCE[0]}")/finetune_dc.sh" "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
