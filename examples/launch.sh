# What the recipes share; sourced by them, after the sizes and before the flags. Bash only.
#
# A recipe is valid bash and valid Python. `bash RECIPE.sh` starts torchrun; `torchrun [flags] RECIPE.sh` starts the
# Python part of the recipe in every process, which enters the file again with bash, and then LOCAL_RANK is set.
#
# From the environment:
#   GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT   the machines (where torchrun is not the caller)
#   CUDA_VISIBLE_DEVICES                                     how many GPUs count, where GPUS_PER_NODE does not say it
#   MAX_RESTARTS                                             how often torchrun starts again after a process died (0)
#   DC_PRINT_ARGV=1                                          print the final flags instead of running
#   PRESET DATASET TENSOR_PARALLEL PIPELINE_PARALLEL         see defaults.sh

fail() { echo "${0##*/}: $*" >&2; exit 2; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# Under torchrun its own interpreter goes on, so that all processes speak the same version of torch.
if [ -n "${LOCAL_RANK:-}" ] && [ -n "${DC_TORCHRUN_PYTHON:-}" ]; then
  python="$DC_TORCHRUN_PYTHON"
elif [ -x "$root/.venv/bin/python" ]; then
  python="$root/.venv/bin/python"
else
  python="$(command -v python3 || command -v python)" || fail "no python found; run: bash tools/setup_env.sh"
fi

source "$root/examples/gpus.sh"
gpus=$(count_gpus)
[ "${DC_DEVICE:-}" = cpu ] && gpus=0
if [ -n "${LOCAL_RANK:-}" ]; then
  processes_per_node="${LOCAL_WORLD_SIZE:?torchrun sets LOCAL_WORLD_SIZE}"
  world_size="${WORLD_SIZE:?torchrun sets WORLD_SIZE}"
else
  # Two processes on a machine without a GPU: tensor parallelism on the CPU.
  processes_per_node="${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 2))}"
  [[ "$processes_per_node ${NNODES:-1}" =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]] ||
    fail "GPUS_PER_NODE=$processes_per_node NNODES=${NNODES:-1}: must be numbers above 0"
  world_size=$((processes_per_node * ${NNODES:-1}))
fi

source "$root/examples/defaults.sh"

# Tensor parallelism before Blackwell needs the order of kernels kept; the engine refuses to start without it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# On a CPU the cores are shared out among the processes. (torchrun as the caller has set 1 where nothing was set.)
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  if [ "$gpus" -gt 0 ]; then
    OMP_NUM_THREADS=4
  else
    OMP_NUM_THREADS=$(($(nproc) / processes_per_node))
    [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
  fi
  export OMP_NUM_THREADS
fi

# batch_flags GLOBAL LARGEST: LLaVA's two batch flags for a global batch of GLOBAL samples on this many processes,
# with at most LARGEST samples per device at once (or PER_DEVICE_TRAIN_BATCH_SIZE). Sets the array BATCH_FLAGS.
batch_flags() {
  local global="$1" per_device="${PER_DEVICE_TRAIN_BATCH_SIZE:-}"
  [ $((global % world_size)) = 0 ] ||
    fail "GLOBAL_BATCH_SIZE=$global: not divisible by $world_size processes; change one of the two"
  local share=$((global / world_size))
  [ -n "$per_device" ] || per_device=$((share < $2 ? share : $2))
  if [ $((share % per_device)) != 0 ]; then
    fail "GLOBAL_BATCH_SIZE=$global: $share samples a process, not a multiple of PER_DEVICE_TRAIN_BATCH_SIZE=$per_device"
  fi
  BATCH_FLAGS=(--per_device_train_batch_size "$per_device" --gradient_accumulation_steps $((share / per_device)))
}

# asks_for_dry_run FLAGS...: whether the last --dry-run among them is on.
asks_for_dry_run() {
  local word before="" dry=1
  for word in "$@"; do
    case "$before$word" in
      --dry[-_]run | --dry[-_]run=[Tt]rue) dry=0 ;;
      --dry[-_]run=[Ff]alse | --dry[-_]run\ [Ff]alse) dry=1 ;;
    esac
    case "$word" in --dry[-_]run) before="$word " ;; *) before="" ;; esac
  done
  return "$dry"
}

# launch FLAGS...: checks the flags, then becomes the training process, or torchrun.
launch() {
  if [ "${DC_PRINT_ARGV:-}" = 1 ]; then
    [ "${RANK:-0}" = 0 ] || exit 0
    WORLD_SIZE="$world_size" exec "$python" -m dc_megatron.training.check_argv "$@"
  fi
  if [ -n "${LOCAL_RANK:-}" ]; then
    exec "$python" -m dc_megatron.pretrain "$@"
  fi
  if asks_for_dry_run "$@"; then
    # One process plays all ranks, whatever their number.
    WORLD_SIZE="$world_size" exec "$python" -m dc_megatron.pretrain "$@"
  fi
  # Once, before there are many processes to complain.
  WORLD_SIZE="$world_size" "$python" -m dc_megatron.training.check_argv "$@" || exit $?
  for word in "$@"; do
    case "$word" in -h | --help | --help-megatron | --help_megatron) exit 0 ;; esac
  done
  local where=(--standalone) restarts="${MAX_RESTARTS:-0}"
  if [ "$restarts" != 0 ]; then
    # A second start on the first one's store finds the addresses of processes that are dead.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  fi
  if [ "${NNODES:-1}" != 1 ] && [ "$restarts" != 0 ]; then
    # Nodes agree on a new start only where they meet again. They number themselves.
    where=(--rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-dc_megatron}")
    where+=(--rdzv-endpoint "${MASTER_ADDR:?set MASTER_ADDR to the first node}:${MASTER_PORT:-29500}")
  elif [ "${NNODES:-1}" != 1 ]; then
    where=(--node-rank "${NODE_RANK:?set NODE_RANK on every node}")
    where+=(--master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first node}" --master-port "${MASTER_PORT:-29500}")
  elif [ -n "${MASTER_PORT:-}" ]; then
    where=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
  fi
  # SIGUSR1 asks the ranks to save and exit, and a cluster sends it to every process it knows. torchrun would die of it
  # and leave them alone; ignored here it is ignored there, and the ranks set their own handler.
  trap '' USR1
  exec "$python" -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "$processes_per_node" \
    --max-restarts "$restarts" "${where[@]}" -m dc_megatron.pretrain "$@"
}
