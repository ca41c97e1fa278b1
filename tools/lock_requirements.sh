#!/usr/bin/env bash
# Re-pins every dependency with hashes: requirements/*.in -> requirements/{uv,cu12,cu13}.txt.
# The outputs name no registry address, so that any mirror serves them. Usage: bash tools/lock_requirements.sh
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  .venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command "bash tools/lock_requirements.sh" "$@"
}
compile requirements/uv.in -o requirements/uv.txt
for cuda in cu12 cu13; do
  compile requirements/run.in requirements/dev.in "requirements/dali_$cuda.in" -o "requirements/$cuda.txt"
done
if grep -nE '://|--(extra-)?index-url|--find-links' requirements/*.txt; then
  echo "lock_requirements.sh: the lines above name an address; remove them" >&2
  exit 1
fi
