# How many GPUs a run started here would see; sourced by launch.sh and quickstart.sh. Bash only.

# count_gpus: prints the number. CUDA_VISIBLE_DEVICES is read as CUDA does: numbers or UUIDs, and the list ends at the
# first entry that is neither a GPU of this machine nor a UUID, so that an empty value and -1 mean none.
count_gpus() {
  local here entry entries visible=0
  here=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "$here" = 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    echo "$here"
    return
  fi
  IFS=, read -ra entries <<<"$CUDA_VISIBLE_DEVICES" || true
  for entry in "${entries[@]}"; do
    entry="${entry// /}"
    case "$entry" in
      GPU-* | MIG-*) ;;
      *) [[ "$entry" =~ ^[0-9]+$ ]] && [ "$((10#$entry))" -lt "$here" ] || break ;;
    esac
    visible=$((visible + 1))
  done
  echo "$visible"
}
