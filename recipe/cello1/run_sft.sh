#!/usr/bin/env bash
# Cold start: supervised fine-tuning on puzzles with traces, as published (LoRA with DoRA, TRL and PEFT), then the merge.
#
#   MODEL=Qwen/Qwen2.5-7B-Instruct TRAIN_DATA=reasoning.json bash recipe/cello1/run_sft.sh
#   ... run_sft.sh --no-dora                   plain LoRA, which trains about twice as fast
#   ... run_sft.sh --full                      all weights
#   ... run_sft.sh trainer.learning_rate=1e-4  any setting of config/cello1_sft.yaml
#
# Variables: MODEL (folder or Hub id), TRAIN_DATA (puzzles with traces), OUTPUT (folder), NUM_GPUS (default: all that are
# visible; without a GPU it is the number of processes, by default 1), SEED. Over several the weights are sharded (FSDP2), and
# an update stays one over 96 puzzles: gradient_accumulation_steps counts those of all processes together.
# Killed and started again with the same OUTPUT it goes on where it was. The model comes to OUTPUT/model.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=launch/messages.sh
source "$here/launch/messages.sh"

settings=()
full=0
for argument in "$@"; do
  case $argument in
  --no-dora) settings+=(lora.use_dora=false) ;;
  --full) full=1 ;;
  --*) fail "unknown option $argument; there are --no-dora and --full, and settings key=value" ;;
  *) settings+=("$argument") ;;
  esac
done
[ "$full" = 0 ] || settings+=(lora=null) # last, so that --no-dora beside it brings no adapters back
[ -n "${MODEL:-}" ] || fail "MODEL is not set; give the folder or Hub id of the model to start from"
[ -n "${TRAIN_DATA:-}" ] || fail "TRAIN_DATA is not set; give puzzle JSON with traces"

# shellcheck source=launch/setup_env.sh
source "$here/launch/setup_env.sh" train
export TOKENIZERS_PARALLELISM=false
OUTPUT=${OUTPUT:-$root/outputs/sft}
# shellcheck source=launch/run_env.sh
source "$here/launch/run_env.sh"
if [ "$CELLO1_DEVICE" = gpu ]; then
  NUM_GPUS=${NUM_GPUS:-$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")}
  precision=bf16
else
  NUM_GPUS=${NUM_GPUS:-1}
  precision=no
  settings=(dtype=float32 trainer.bf16=false trainer.use_cpu=true "${settings[@]}")
fi

command=("$PYTHON" -m)
if [ "$NUM_GPUS" -gt 1 ]; then
  command+=(accelerate.commands.launch --num_processes "$NUM_GPUS" --main_process_port 0 --mixed_precision "$precision"
    --config_file "$here/config/accelerate/fsdp2.yaml" -m)
fi
"${command[@]}" recipe.cello1 sft "model=$MODEL" "train=$TRAIN_DATA" "output=$OUTPUT" "seed=${SEED:-1}" "${settings[@]}"
