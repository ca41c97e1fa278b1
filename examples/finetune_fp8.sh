#!/usr/bin/env bash
""":"
# Stage 2 in FP8: GPUs of compute capability 8.9 or later, with Transformer Engine (tools/doctor.py says what is there).
#
#   bash examples/finetune_fp8.sh [flags]
#   PRESET=llama3-8b bash examples/finetune_fp8.sh --fp8-recipe tensorwise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/finetune_dc.sh" --fp8-format hybrid --fp8-recipe delayed "$@"
: <<'#PYTHON'
"""
# Only torchrun gets here: it starts this file with Python in every process. Bash has left with launch above.
import os
import sys

os.environ["DC_TORCHRUN_PYTHON"] = sys.executable
os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])
#PYTHON
