#!/usr/bin/env bash
# GRPO of a 7B model with random weights on the GPUs of this machine: ten steps, and a table of speed and memory.
#
#   bash benchmarks/bench_gpu.sh                     HARDWARE=1x140gb
#   HARDWARE=1x80gb bash benchmarks/bench_gpu.sh     or another file of recipe/cello1/config/hardware
#
# Nothing is downloaded but packages: the model has the shape of Qwen2.5-7B, its weights are drawn. The table goes to
# benchmarks/results/. Arguments are Hydra overrides.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=../recipe/cello1/launch/setup_env.sh
source recipe/cello1/launch/setup_env.sh train
[ "$CELLO1_DEVICE" = gpu ] || { echo "error: bench_gpu.sh needs a GPU; none was found" >&2; exit 2; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

HARDWARE=${HARDWARE:-1x140gb}
out=${OUTPUT:-$root/outputs/bench_gpu-$HARDWARE}
rm -rf "$out/run"
"$PYTHON" benchmarks/gpu_inputs.py --out "$out"
MODEL=$out/model TRAIN_DATA=$out/train.parquet VAL_DATA=$out/train.parquet OUTPUT=$out/run HARDWARE=$HARDWARE TRAIN_ONLY=1 \
  bash recipe/cello1/run_grpo.sh "trainer.logger=[file]" trainer.total_training_steps=10 trainer.save_freq=-1 \
  trainer.test_freq=-1 trainer.val_before_train=false data.max_response_length=1024 "$@"
mkdir -p benchmarks/results
{
  "$PYTHON" benchmarks/gpu_report.py "$out/run/metrics" --hardware "$HARDWARE"
  "$PYTHON" benchmarks/bench_training_overhead.py --metrics "$out/run/metrics" --batch 64x5
} | tee "benchmarks/results/gpu-$HARDWARE.md"
