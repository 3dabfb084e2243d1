# Sourced: find_device sets device to gpu or cpu, and says where GPUs will not be used that somebody may believe are.
find_device() {
  local listed found=cpu
  listed=$(command -v nvidia-smi >/dev/null && nvidia-smi -L 2>&1) || : # all of it: cut off while it writes, it would fail
  [[ $'\n'$listed != *$'\n'"GPU "* ]] || found=gpu
  device=${CELLO1_DEVICE:-$found}
  if [[ $found == gpu && -z ${CELLO1_DEVICE:-} && ${CUDA_VISIBLE_DEVICES-0} == @(|-1|NoDevFiles) ]]; then
    device=cpu
    printf 'set-up: nvidia-smi lists a GPU, but CUDA_VISIBLE_DEVICES=%s hides it: it will not be used\n' "$CUDA_VISIBLE_DEVICES" >&2
  elif [[ $found$device == gpucpu ]]; then
    printf 'set-up: nvidia-smi lists a GPU, but CELLO1_DEVICE=cpu: it will not be used\n' >&2
  elif [[ $found == cpu && -z ${CELLO1_DEVICE:-} && -n $listed ]]; then
    listed=${listed%%$'\n'*}
    printf 'set-up: nvidia-smi lists no GPU (%s): none will be used\n' "${listed//[^[:print:]]/?}" >&2
  fi
}
