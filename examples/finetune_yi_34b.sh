#!/usr/bin/env bash
""":"
# Stage 2 of Nous-Hermes-2-Yi-34B in full, without LoRA: 16, 32 or 64 GPUs of 80 GB, tensor parallel 8, pipeline 2.
#
#   NNODES=4 GPUS_PER_NODE=8 NODE_RANK=0..3 MASTER_ADDR=... bash examples/finetune_yi_34b.sh [flags]
#   sbatch --nodes=4 examples/slurm.sbatch examples/finetune_yi_34b.sh [flags]
#
# Stage 1: PRESET=hermes-2-yi-34b bash examples/pretrain_dc.sh, from 8 GPUs on.
set -euo pipefail
export PRESET=hermes-2-yi-34b
source "$(dirname "${BASH_SOURCE[0]}")/finetune_dc.sh" "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
