#!/usr/bin/env bash
""":"
# Stage 2 with LoRA, as the original trains its 34B and 70B models: r 128, alpha 256, learning rate 2e-4 for the
# adapters and 2e-5 for the connector, which is trained in full. Needs no more GPUs than stage 1.
#
#   bash examples/finetune_lora.sh [flags]
#   PRESET=llama3-70b bash examples/finetune_lora.sh
set -euo pipefail
export LORA=True PRESET="${PRESET:-hermes-2-yi-34b}"
source "$(dirname "${BASH_SOURCE[0]}")/finetune_dc.sh" "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
