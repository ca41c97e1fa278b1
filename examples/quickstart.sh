#!/usr/bin/env bash
# Trains a tiny Dense Connector model through every stage, with tensor parallelism, on what this machine has, and asks
# it questions about pictures it has not seen. Under 6 minutes on two cores, after the install.
#
#   bash examples/quickstart.sh
#   QUICKSTART_STEPS=20 QUICKSTART_RUN=/tmp/try bash examples/quickstart.sh
#
# 1. text:    a small language model learns from text alone to answer from a description in words
# 2. stage 1: only the connector learns, to say the same through a frozen, randomly initialised CLIP tower
# 3. stage 2: connector and language model learn together
# 4. export:  the result as a stock Hugging Face Llava folder, which plain transformers answers from
# Every run starts over: what an earlier one left in its folder is removed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "quickstart.sh: $*" >&2; exit 2; }
[ $# = 0 ] || fail "takes no arguments, only environment variables; they are listed in examples/quickstart.sh"

run="${QUICKSTART_RUN:-runs/quickstart}" # everything is written here
text_steps="${QUICKSTART_TEXT_STEPS:-${QUICKSTART_STEPS:-250}}"
stage1_steps="${QUICKSTART_STAGE1_STEPS:-${QUICKSTART_STEPS:-220}}"
stage2_steps="${QUICKSTART_STAGE2_STEPS:-${QUICKSTART_STEPS:-120}}"
batch="${QUICKSTART_BATCH:-32}"             # samples a step
texts="${QUICKSTART_TEXTS:-8000}"           # text-only records
pictures="${QUICKSTART_PICTURES:-3000}"     # pictures trained on
held_out="${QUICKSTART_HELD_OUT:-60}"       # questions of each of three kinds
tensor_parallel="${QUICKSTART_TP:-2}"       # also the number of processes
seed="${QUICKSTART_SEED:-0}"

for number in "$text_steps" "$stage1_steps" "$stage2_steps" "$batch" "$texts" "$pictures" "$held_out" "$tensor_parallel"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "'$number': sizes in QUICKSTART_* are whole numbers above 0"
done

# Only a folder that this script made is emptied, and by one run at a time.
mark="$run/.quickstart"
if [ -d "$run" ] && [ ! -e "$mark" ] && [ -n "$(ls -A "$run")" ]; then
  fail "QUICKSTART_RUN=$run: the folder holds other things; give a new or empty one"
fi
mkdir -p "$run"
exec 8>"$mark"
flock -n 8 || fail "another quickstart is running in $run; wait for it or give another folder in QUICKSTART_RUN"
for old in data models text stage1 stage2 export export.partial answers logs summary.json loss.png; do rm -rf "${run:?}/$old"; done
mkdir -p "$run/logs" "$run/answers"

step_number=0
steps_in_all=8
# step NAME TITLE COMMAND...: runs the command with its output in logs/NAME.log; on failure shows the end of it and leaves.
step() {
  local name="$1" title="$2" start=$SECONDS status=0
  shift 2
  step_number=$((step_number + 1))
  printf '[%d/%d] %-58s ' "$step_number" "$steps_in_all" "$title"
  "$@" >"$run/logs/$name.log" 2>&1 || status=$?
  if [ "$status" != 0 ]; then
    printf 'failed\n'
    tail -n 40 "$run/logs/$name.log" >&2
    echo "quickstart.sh: '$title' ended with status $status; its whole output is in $run/logs/$name.log" >&2
    exit "$status"
  fi
  printf '%4d s\n' $((SECONDS - start))
}

bash tools/setup_env.sh
python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Tensor parallelism before Blackwell needs the order of kernels kept; the engine refuses to start without it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
source examples/gpus.sh
gpus=$(count_gpus)
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$tensor_parallel" ] && [ -z "${DC_DEVICE:-}" ]; then
  echo "$tensor_parallel processes need as many GPUs and here is $gpus: running on the CPU (QUICKSTART_TP=1 uses the GPU)"
  export DC_DEVICE=cpu
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  OMP_NUM_THREADS=$(($(nproc) / tensor_parallel))
  # The model is tiny: more threads than this only wait for each other.
  OMP_NUM_THREADS=$((OMP_NUM_THREADS < 1 ? 1 : OMP_NUM_THREADS > 4 ? 4 : OMP_NUM_THREADS))
  export OMP_NUM_THREADS
fi

make_inputs() {
  local status=0
  $python examples/quickstart/make_data.py --out "$run/data" --texts "$texts" --pictures "$pictures" \
    --held-out "$held_out" --seed "$seed" &
  local data=$!
  $python examples/quickstart/make_models.py --out "$run/models" --seed "$seed" || status=$?
  wait "$data" || status=$?
  return "$status"
}

# train STAGE STEPS MEAN FLAGS...: one training run in RUN/STAGE. MEAN is about a sample's length: a row of BATCH x MEAN
# positions holds about BATCH samples. One row a step, because on the CPU every message between the processes costs the
# same.
train() {
  local stage="$1" steps="$2" row=$((batch * $3)) longest=64
  shift 3
  $python -m torch.distributed.run --standalone --nproc-per-node "$tensor_parallel" -m dc_megatron.pretrain \
    --model_name_or_path "$run/models/language_model" --vision_tower "$run/models/vision_tower" \
    --mm_dense_connector_type dci --version v1 --image_folder "$run/data" --model_max_length "$longest" \
    --tensor-model-parallel-size "$tensor_parallel" --packing best-fit --global-batch-size 1 \
    --seq-length $((row > longest ? row : longest)) \
    --max_steps "$steps" --save_steps "$steps" --lr_scheduler_type cosine --weight_decay 0 \
    --logging_steps 10 --dataloader_num_workers 1 --seed "$((seed + 1))" --output_dir "$run/$stage" "$@"
}

# ask STAGE: the held-out questions, with their picture and with a blank one.
ask() {
  $python tools/generate.py --load "$run/$1" --data_path "$run/data/held_out.json" --image_folder "$run/data" \
    --answers "$run/answers/$1.jsonl" --max-new-tokens 8
}

step inputs "draws pictures, makes a tokenizer and random models" make_inputs
# Text moves no weight of the connector: it gets no gradient without a picture.
step text "text: the language model learns, $text_steps steps" \
  train text "$text_steps" 50 --data_path "$run/data/text.json" --trainable connector,llm \
  --learning_rate 1e-3 --warmup_ratio 0.03
step stage1 "stage 1: the connector learns, $stage1_steps steps" \
  train stage1 "$stage1_steps" 49 --data_path "$run/data/train.json" --image_aspect_ratio square \
  --trainable connector --load "$run/text" --finetune --learning_rate 2e-3 --warmup_ratio 0.03
step ask-stage1 "asks about pictures not seen before" ask stage1
# A short warm-up here would undo part of stage 1 before improving on it.
step stage2 "stage 2: connector and language model learn, $stage2_steps steps" \
  train stage2 "$stage2_steps" 49 --data_path "$run/data/train.json" --image_aspect_ratio pad --trainable connector,llm \
  --load "$run/text" --finetune --pretrain_mm_mlp_adapter "$run/stage1" --learning_rate 5e-4 --warmup_ratio 0.1
step ask-stage2 "asks again" ask stage2
step export "exports to a stock Hugging Face Llava folder" \
  $python tools/convert.py export --load "$run/stage2" --format hf-llava --save "$run/export"
step ask-export "asks plain transformers, from the exported folder" \
  $python examples/quickstart/answer_with_transformers.py --model "$run/export" --data_path "$run/data/held_out.json" \
  --image_folder "$run/data" --answers "$run/answers/export.jsonl" --max_new_tokens 8
$python examples/quickstart/summary.py --run "$run" --tensor-parallel "$tensor_parallel"
