#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command that fits ten minutes.
# Usage: bash benchmarks/run_gpu.sh [PART...]       (default: tests stage1 stage2)
#   Results go to $OUT (default: runs/gpu). Wheels in .whl/ (tools/carry_wheels.py join, or as they are) are installed
#   into a folder of their own first, for machines without a network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
if [ -d .whl ]; then
  "$python" tools/carry_wheels.py join .whl --save /tmp/dc_wheels >"$OUT/wheels.txt"
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/dc_site \
    /tmp/dc_wheels/*.whl 2>&1 | grep -v WARN
  export PYTHONPATH="/tmp/dc_site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

steps() { "$python" -W ignore tools/benchmark.py "$@" 2>&1 | tee "$OUT/$1.log"; }

[ $# -gt 0 ] || set -- tests stage1 stage2
for part in "$@"; do
  echo "== $part ($SECONDS s)"
  case "$part" in
    tests) timeout 240 "$python" -m pytest -q tests/gpu -x -p no:cacheprovider 2>&1 | tee "$OUT/tests.log" | tail -15 ;;
    stage1) steps 7b-stage1 --output "$OUT/7b-stage1.json" --profile "$OUT" ;;
    stage2) steps 7b-stage2 --output "$OUT/7b-stage2.json" --profile "$OUT" ;;
    *) echo "run_gpu.sh: unknown part '$part'; one of: tests stage1 stage2" >&2; exit 2 ;;
  esac
done
echo "== done ($SECONDS s)"
