#!/usr/bin/env bash
# RL training of a Cell-o1 model with verl, from set-up to the table of what was gained. Called by run_grpo.sh, run_ppo.sh.
#
#   bash recipe/cello1/run_grpo.sh                        the main job: pancreas cells of four donors, small model, CPU or GPU
#   SMOKE=1 bash recipe/cello1/run_grpo.sh                the same in miniature, on the blood cells that come with scanpy
#   H5AD=folder PREPARE_ARGS="--donor-column donor" bash recipe/cello1/run_grpo.sh      the same on your own files
#   MODEL=... TRAIN_DATA=... VAL_DATA=... bash recipe/cello1/run_grpo.sh       the published 7B configuration on your data
#
# Variables: H5AD (file or folder of h5ad and zarr), PREPARE_ARGS (options of `cello1 prepare`, such as the columns), CELLS
# (pancreas or pbmc: which cells are taken without H5AD), MODEL (folder or Hub id), TRAIN_DATA, VAL_DATA (RL parquet, or puzzle
# JSON), OUTPUT (folder), HARDWARE (a file of config/hardware), NNODES, RAY_ADDRESS (a running Ray cluster, for several nodes),
# SEED, TRAIN_ONLY (1: neither export nor evaluation), TRUST_CHECKPOINT (1: go on from a checkpoint that could run code).
# Arguments are Hydra overrides, passed to verl as they are: +variant=dapo, for instance. verl runs in OUTPUT, where relative
# paths in overrides start.
# Killed and started again with the same OUTPUT it goes on where it was; with another model, data or settings it is refused.
set -euo pipefail

algorithm=$1 # grpo | ppo: config/cello1_$algorithm.yaml
shift
title=${algorithm^^}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configs=$(cd "$here/../config" && pwd)
root=$(cd "$here/../../.." && pwd)
# shellcheck source=messages.sh
source "$here/messages.sh"
set_text() { # a Hydra override whose value may hold any character: before a quote, the last one too, backslashes count double
  local rest=$2\" part text=""
  while [ -n "$rest" ]; do
    part=${rest%%\"*} rest=${rest#*\"}
    text+=$part${part##*[^\\]}\\\"
  done
  printf '%s="%s"' "$1" "${text%\\\"}"
}

# shellcheck source=setup_env.sh
source "$here/setup_env.sh" train

SEED=${SEED:-1}
SMOKE=${SMOKE:-0}
config=(--config-path "$configs" --config-name "cello1_$algorithm")
settings=("data.seed=$SEED" "actor_rollout_ref.actor.data_loader_seed=$SEED" "actor_rollout_ref.rollout.seed=$SEED")
if [ "$CELLO1_DEVICE" = cpu ]; then
  # shellcheck source=cpu_env.sh
  source "$here/cpu_env.sh"
  HARDWARE=${HARDWARE:-cpu}
elif ! "$PYTHON" -P -c "import importlib.util as u, sys; sys.exit(u.find_spec('flash_attn') is None)"; then
  [ "$algorithm" != ppo ] || fail "PPO on a GPU needs flash-attn, without which verl loads no value model; install it"
  printf 'note: flash-attn is not installed: attention runs as sdpa, which takes more time and memory\n' >&2
  [ "${HARDWARE:-}" = cpu ] || settings+=("+attention=sdpa")
fi

if [ -n "${MODEL:-}" ]; then
  [ -z "${H5AD:-}${CELLS:-}" ] || fail "MODEL is set, and H5AD or CELLS, of which a small model is made; leave one of them out"
  [ -n "${TRAIN_DATA:-}" ] || fail "MODEL is set but TRAIN_DATA is not; give RL parquet or puzzle JSON to train on"
  [ -n "${VAL_DATA:-}" ] || fail "MODEL is set but VAL_DATA is not; give RL parquet or puzzle JSON to evaluate on"
  OUTPUT=${OUTPUT:-$root/outputs/$algorithm}
  [ "${NNODES:-1}" = 1 ] && HARDWARE=${HARDWARE:-8x80gb} || HARDWARE=${HARDWARE:-multinode}
  before=("before $title=$MODEL")
else
  [ -z "${TRAIN_DATA:-}${VAL_DATA:-}" ] || fail "TRAIN_DATA or VAL_DATA is set but MODEL is not; give the model to train"
  [ -e "$here/small_model.sh" ] || fail "MODEL is not set; give MODEL, TRAIN_DATA and VAL_DATA"
  # shellcheck source=small_model.sh
  source "$here/small_model.sh"
  [ "$algorithm" = grpo ] || name+=-$algorithm
  OUTPUT=${OUTPUT:-$root/outputs/$name}
  HARDWARE=${HARDWARE:-1x80gb}
  settings+=("+scale=[$scale]")
fi
evaluation=()
for name in OUTPUT MODEL TRAIN_DATA VAL_DATA TENSORBOARD_DIR; do
  [[ ${!name:-} != *'${'* ]] || fail "$name=${!name} contains '\${', which verl would expand; rename the folder or file"
done
[ -f "$configs/hardware/$HARDWARE.yaml" ] ||
  fail "HARDWARE=$HARDWARE is unknown; it is one of $(cd "$configs/hardware" && echo [!_]*.yaml | sed 's/\.yaml//g')"
[ "$HARDWARE" != multinode ] || [ -n "${NNODES:-}" ] || fail "HARDWARE=multinode needs NNODES, the number of Ray nodes"
settings+=("hardware=$HARDWARE")
[ -z "${NNODES:-}" ] || settings+=("trainer.nnodes=$NNODES")

# shellcheck source=run_env.sh
source "$here/run_env.sh"
for module in "$OUTPUT"/*.{py,pyc,so} "$OUTPUT"/*/__init__.*; do
  [ ! -e "$module" ] || fail "OUTPUT=$OUTPUT holds Python modules ($module), which Ray would load; choose another OUTPUT"
done
cd "$OUTPUT" # Ray puts the working directory first on the path of its workers

if [ -z "${MODEL:-}" ]; then
  make_data
  stage "cold start: supervised fine-tuning on the traces"
  "$PYTHON" -m recipe.cello1 sft "${sft[@]}" "model=$OUTPUT/data/model" "train=$OUTPUT/data/sft.json" \
    "output=$OUTPUT/sft" "seed=$SEED"
  before=("before SFT=$OUTPUT/data/model" "after SFT=$OUTPUT/sft/model")
  MODEL=$OUTPUT/sft/model
  TRAIN_DATA=$OUTPUT/data/rl.json
  VAL_DATA=$OUTPUT/data/rl/test.parquet
  # Untrained, a read-out is as good as chance, and takes the longest: evidence that finds no end.
  evaluation=(--decode greedy,constrained,matrix --decode-first greedy,constrained --baseline "$OUTPUT/data/train/train_data.json")
fi

if [ -n "${WANDB_API_KEY:-}" ]; then
  logger="trainer.logger=[console,file,tensorboard,wandb]"
  if [ -z "${RAY_ADDRESS:-}" ]; then
    settings+=("$logger")
  else # an override would hand the key over, and into the logs
    printf 'note: WANDB_API_KEY does not reach a running Ray cluster: export it before `ray start`, and add %s here\n' \
      "$logger" >&2
  fi
fi
export TENSORBOARD_DIR="${TENSORBOARD_DIR:-$OUTPUT/tensorboard}"
if [ -n "${RAY_ADDRESS:-}" ]; then
  # The workers of a cluster that is there already have its environment, not this one, and it says itself what its nodes have.
  worker=+ray_kwargs.ray_init.runtime_env.env_vars
  settings+=("$(set_text "$worker.VERL_FILE_LOGGER_PATH" @METRICS@)" "$(set_text "$worker.TENSORBOARD_DIR" "$TENSORBOARD_DIR")" "$(set_text "$worker.CELLO1_LIMIT_TEMPLATES" 1)")
  settings+=(ray_kwargs.ray_init.num_cpus=null)
  [ "$HARDWARE" != cpu ] || settings+=(ray_kwargs.ray_init.{num_gpus,object_store_memory}"=null")
else
  settings+=(+ray_kwargs.ray_init.address=local) # never a Ray that somebody left running
fi

trust=()
[ "${TRUST_CHECKPOINT:-0}" != 1 ] || trust=(--trust-checkpoint)
"$PYTHON" -m recipe.cello1 preflight "${trust[@]}" --model "$MODEL" --train "$TRAIN_DATA" --val "$VAL_DATA" --run "$OUTPUT" \
  --config "cello1_$algorithm" -- "${settings[@]}" "$@" >"$TMPDIR/files"
mapfile -d "" -t files <"$TMPDIR/files"
export CELLO1_CHECKED="${files[2]}" # hashes of these files: the training need not check their rows again

composed=$OUTPUT/hydra/.hydra/config.yaml
stage "$title with verl (HARDWARE=$HARDWARE; log: $OUTPUT/$algorithm.log)"
if [ ! -e "$OUTPUT/model" ]; then
  "$PYTHON" -m recipe.cello1 watch --log "$OUTPUT/$algorithm.log" --metrics "$OUTPUT/metrics" --description "$title" -- \
    "$PYTHON" -m verl.trainer.main_ppo "${config[@]}" "${settings[@]}" \
    "$(set_text data.train_files "${files[0]}")" "$(set_text data.val_files "${files[1]}")" \
    "$(set_text actor_rollout_ref.model.path "$MODEL")" \
    "$(set_text trainer.default_local_dir "$OUTPUT/$algorithm")" "$(set_text hydra.run.dir "$OUTPUT/hydra")" "$@"
  [ "${TRAIN_ONLY:-0}" = 0 ] || exit 0
  stage "checkpoint to Hugging Face format"
  "$PYTHON" -m recipe.cello1 export "${trust[@]}" "$OUTPUT/$algorithm" --out "$OUTPUT/model" \
    --config "$composed" --metrics "$OUTPUT/metrics"
fi

[ -e "$here/summary.py" ] || exit 0 # not part of the recipe in verl-recipe
stage "held-out puzzles, before and after"
"$PYTHON" -m recipe.cello1 summary --data "${files[1]}" --metrics "$OUTPUT/metrics" --out "$OUTPUT/summary" \
  --config "$composed" "${evaluation[@]}" "${before[@]}" "after $title=$OUTPUT/model"
