#!/usr/bin/env bash
# Runs the tests; makes .venv first where it is absent or its pins have changed.
# Usage: bash tests/run.sh [--all] [pytest arguments]
#   bash tests/run.sh                       the default tests (about 15 minutes on two cores)
#   bash tests/run.sh --all                 the long ones as well (up to 60 minutes)
#   bash tests/run.sh tests/unit -k argv    whatever pytest understands
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh

# Many small processes share the cores: one thread each, nothing from a hub, no warning about it from tokenizers.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec .venv/bin/python -m pytest "$@"
