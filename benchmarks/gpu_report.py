"""Table of a training run: medians over its steps, without the first two, in which things are compiled and filled."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from recipe.cello1.formats.provenance import package_versions
from recipe.cello1.rl.run_metrics import read_metrics

N_WARM_UP = 2
METRICS = (
    ("timing_s/step", "step (s)"),
    ("timing_s/gen", "generation (s)"),
    ("timing_s/update_actor", "update (s)"),
    ("timing_s/update_weights", "weight sync (s)"),
    ("perf/throughput", "tokens per second and GPU"),
    ("perf/max_memory_allocated_gb", "memory allocated by training (GB)"),
    ("perf/max_memory_reserved_gb", "memory reserved by training (GB)"),
    ("prompt_length/mean", "prompt (tokens)"),
    ("response_length/mean", "response (tokens)"),
)
PACKAGES = ("cello1", "verl", "vllm", "torch", "transformers", "flash-attn")


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="metrics folder of the run")
    parser.add_argument("--hardware", required=True, help="setting of the run, for the heading")
    args = parser.parse_args()
    steps = [step for step in read_metrics(args.metrics) if step["step"] > N_WARM_UP]
    if not steps:
        raise SystemExit(f"error: {args.metrics} has no step after the first {N_WARM_UP}")
    print(f"## {args.hardware} on {_gpu()}, median of {len(steps)} steps\n")
    print(", ".join(f"{name} {found}" for name, found in package_versions(PACKAGES).items()) + "\n")
    print("| | median |\n| --- | ---: |")
    for key, label in METRICS:
        if values := [step[key] for step in steps if key in step]:
            print(f"| {label} | {statistics.median(values):.2f} |")
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
