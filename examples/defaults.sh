# What depends on the model and on the data, for all recipes; sourced by launch.sh. Bash only.
#
# From the environment:
#   PRESET    the model: phi-2 vicuna-7b vicuna-13b llama3-8b llama3-70b hermes-2-yi-34b (default: vicuna-7b)
#   DATASET   the data: llava-1.5 or mini-gemini (default: llava-1.5)
#   TENSOR_PARALLEL PIPELINE_PARALLEL   how the model is divided, in place of what is said here
#
# Divisions are "tensor pipeline", for GPUs of 80 GB, by tools/plan.py's estimates with recomputation: all: everything
# learns, with fp32 gradients and optimizer; few: the connector or adapters learn. Data parallelism takes what is left.

preset="${PRESET:-vicuna-7b}"
case "$preset" in
  phi-2) model_folder=checkpoints/phi-2 model_template=phi division_all="1 1" division_few="1 1" ;;
  vicuna-7b) model_folder=checkpoints/vicuna-7b-v1.5 model_template=v1 division_all="2 1" division_few="2 1" ;;
  vicuna-13b) model_folder=checkpoints/vicuna-13b-v1.5 model_template=v1 division_all="4 1" division_few="2 1" ;;
  # llama_3 is the template of the released models; see docs/data.md about llama_3_chat.
  llama3-8b) model_folder=checkpoints/Meta-Llama-3-8B-Instruct model_template=llama_3 division_all="2 1" division_few="2 1" ;;
  llama3-70b) model_folder=checkpoints/Meta-Llama-3-70B-Instruct model_template=llama_3 division_all="8 4" division_few="8 1" ;;
  hermes-2-yi-34b) model_folder=checkpoints/Nous-Hermes-2-Yi-34B model_template=chatml_direct division_all="8 2" division_few="8 1" ;;
  *) fail "PRESET=$preset: unknown; one of phi-2, vicuna-7b, vicuna-13b, llama3-8b, llama3-70b, hermes-2-yi-34b" ;;
esac

dataset="${DATASET:-llava-1.5}"
case "$dataset" in
  llava-1.5)
    captions=data/pretrain/blip_laion_cc_sbu_558k.json caption_images=data/pretrain/images
    conversations=data/finetune/llava_v1_5_mix665k.json conversation_images=data/finetune
    run_name="$preset-dci" ;;
  mini-gemini)
    captions=data/MiniGemini-Pretrain/minigemini_pretrain.json caption_images=data/MiniGemini-Pretrain
    conversations=data/MiniGemini-Finetune/minigemini_instruction.json conversation_images=data/MiniGemini-Finetune
    run_name="$preset-dci-mgm" ;;
  *) fail "DATASET=$dataset: unknown; one of llava-1.5, mini-gemini" ;;
esac

# divide "TENSOR PIPELINE": sets tensor_parallel and pipeline_parallel. A smaller machine gets as much tensor parallelism
# as it has processes for; fewer stages than said would not fit, so that is for the user to decide.
divide() {
  local tensor pipeline
  read -r tensor pipeline <<<"$1"
  while [ "$tensor" -gt "$processes_per_node" ] || [ $((processes_per_node % tensor)) != 0 ]; do tensor=$((tensor / 2)); done
  tensor_parallel="${TENSOR_PARALLEL:-$tensor}"
  pipeline_parallel="${PIPELINE_PARALLEL:-$pipeline}"
  [[ "$tensor_parallel $pipeline_parallel" =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]] ||
    fail "TENSOR_PARALLEL=$tensor_parallel PIPELINE_PARALLEL=$pipeline_parallel: must be numbers above 0"
  local model_size=$((tensor_parallel * pipeline_parallel))
  [ $((world_size % model_size)) = 0 ] ||
    fail "PRESET=$preset: divided over $tensor_parallel x $pipeline_parallel (tensor x pipeline) processes, which do not" \
      "divide $world_size; start a multiple of $model_size, or set TENSOR_PARALLEL and PIPELINE_PARALLEL" \
      "(tools/plan.py says what fits)"
}
