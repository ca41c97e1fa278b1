#!/usr/bin/env bash
""":"
# Stage 1 on GPUs without bf16 (V100, 32 GB): fp16 with loss scaling. 7B and 13B, as the original. The loss is a sum over
# targets before it is divided, so a scale that fits is small: from Megatron's 2^32 each halving would cost a step.
#
#   bash examples/pretrain_v100.sh [flags]
#   PRESET=vicuna-13b TENSOR_PARALLEL=4 bash examples/pretrain_v100.sh
set -euo pipefail
export BF16=False FP16=True
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_dc.sh" --initial-loss-scale 65536 "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
