#!/usr/bin/env bash
# Makes .venv with Python 3.12 and everything dc_megatron needs, pinned by hash. Safe to call again: it returns at
# once when the environment already matches the requirement files.
# Usage: bash tools/setup_env.sh [--gpu cu12|cu13]
#   --gpu cu13  also builds Transformer Engine's torch part and flash-attn where a CUDA 13 compiler is (long)
#   --gpu cu12  the same for CUDA 12, with DALI's CUDA 12 build
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup_env.sh: $*" >&2; exit 2; }

cuda=cu13
build_gpu_extensions=0
while [ $# -gt 0 ]; do
  case "$1" in
    --gpu)
      case "${2:-}" in
        cu12 | cu13) cuda="$2"; build_gpu_extensions=1; shift 2 ;;
        *) fail "--gpu takes cu12 or cu13, not '${2:-}'" ;;
      esac ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument '$1'; the only flag is --gpu cu12|cu13" ;;
  esac
done

find_python() {
  local candidate
  for candidate in "${DC_PYTHON:-}" python3.12 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.12 was not found on PATH. Install it (for example: pyenv install 3.12; this folder's
  .python-version then selects it) or name it: DC_PYTHON=/path/to/python3.12 bash tools/setup_env.sh"
}

# The stamp holds what the environment was made from; a changed pin makes a new install.
wanted="$cuda $(cat "requirements/$cuda.txt" requirements/uv.txt | sha256sum | cut -d' ' -f1)"
stamp=.venv/.dc_megatron_stamp
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  # One installer at a time: two shells that start together must not write one environment.
  exec 9>.venv.lock
  flock 9
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    python=$(find_python)
    echo "setup_env.sh: making .venv with $("$python" --version) (some 6 GB, about a minute with a near registry)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
    # Bytecode now, once: importing megatron.training takes 15 s without it and 6 s with it.
    .venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes --compile-bytecode \
      -r "requirements/$cuda.txt"
    .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
    echo "$wanted" >"$stamp"
  fi
  exec 9>&-
fi

if [ "$build_gpu_extensions" = 1 ]; then
  if ! command -v nvcc >/dev/null 2>&1; then
    echo "setup_env.sh: no CUDA compiler (nvcc) on PATH: Transformer Engine and flash-attn are not built;" \
      "training runs on torch kernels (tools/doctor.py shows which)"
    exit 0
  fi
  echo "setup_env.sh: building Transformer Engine 2.20.2 and flash-attn from source; this takes long"
  # These ship as sources; their own build needs the torch that was just installed, hence no isolation.
  MAX_JOBS="${MAX_JOBS:-$(nproc)}" .venv/bin/uv pip install --python .venv/bin/python --no-build-isolation \
    "transformer_engine[pytorch,core_$cuda]==2.20.2" flash-attn
fi
