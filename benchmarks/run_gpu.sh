#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command that fits ten minutes.
# Usage: bash benchmarks/run_gpu.sh [PART...]       stage2 (200 s), stage1 (130 s), fp8 (130 s), tests (130 s); default: all
#   Results go to $OUT (default: runs/gpu). A part that has used up its time ends with what it has measured by then.
#   Where there is a folder .whl, its wheels (whole, or in parts from tools/carry_wheels.py split) are installed into a
#   folder of their own first: for machines without a network.
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || set -- stage2 stage1 fp8 tests
for part in "$@"; do
  case "$part" in
    stage2 | stage1 | fp8 | tests) ;;
    *) echo "run_gpu.sh: unknown part '$part'; one of: stage2 stage1 fp8 tests" >&2; exit 2 ;;
  esac
done
if ! command -v nvidia-smi >/dev/null 2>&1; then
  echo "run_gpu.sh: no nvidia-smi on PATH: there is no GPU here; on a CPU run tools/benchmark.py cpu-small" >&2
  exit 2
fi

OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
if [ -d .whl ]; then
  wheels=$(mktemp -d) site=$(mktemp -d)
  "$python" tools/carry_wheels.py join .whl --save "$wheels" >"$OUT/wheels.txt" || exit
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

steps() {
  # SIGINT and not SIGTERM: the benchmark then writes what it has.
  timeout -s INT "$2" "$python" -W ignore tools/benchmark.py "$1" --profile "$OUT" --profiled ours,ours-fp8 \
    --output "$OUT/$1.json" >"$OUT/$1.log" 2>&1
  grep -A 100 "a large matrix product" "$OUT/$1.log" || tail -n 20 "$OUT/$1.log"
}

for part in "$@"; do
  echo "== $part (after $SECONDS s)"
  case "$part" in
    stage2) steps 7b-stage2 200 ;;
    stage1) steps 7b-stage1 130 ;;
    fp8) timeout 130 "$python" -m pytest -q -x tests/gpu/test_fp8_training.py >"$OUT/fp8.log" 2>&1; tail -n 40 "$OUT/fp8.log" ;;
    tests)
      timeout 130 "$python" -m pytest -q tests/gpu --deselect tests/gpu/test_fp8_training.py >"$OUT/tests.log" 2>&1
      tail -n 30 "$OUT/tests.log"
      ;;
  esac
done
echo "== done (after $SECONDS s); results in $OUT"
