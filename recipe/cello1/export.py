"""Turn the last checkpoint of a training run into a Hugging Face model.

``python -m recipe.cello1.export RUN --out MODEL``

RUN is the run's ``trainer.default_local_dir``; the sharded weights of any world size are merged by
``verl.model_merger``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

STEP_PREFIX = "global_step_"
TRACKER = "latest_checkpointed_iteration.txt"  # written by verl once a checkpoint is complete


def latest_step(run: str | Path) -> int:
    """Find the last complete checkpoint.

    Parameters
    ----------
    run
        ``trainer.default_local_dir`` of the run.

    Returns
    -------
    Its step.

    Raises
    ------
    FileNotFoundError
        If the run has none.
    """
    tracker = Path(run) / TRACKER
    if not tracker.is_file():
        msg = f"{run} has no {TRACKER}: no checkpoint was completed there; train first, or correct the path"
        raise FileNotFoundError(msg)
    return int(tracker.read_text())


def export(run: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Merge the sharded weights of a checkpoint.

    Parameters
    ----------
    run
        ``trainer.default_local_dir`` of the run.
    out
        Folder of the model; must not exist. Appears whole or not at all.
    step
        Step to export, by default the last one.

    Returns
    -------
    ``out``

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    FileNotFoundError
        If there is no such checkpoint.
    RuntimeError
        If the merger fails, with its last line.
    """
    out = Path(out)
    if out.exists():
        msg = f"{out} exists; remove it or choose another --out"
        raise FileExistsError(msg)
    step = latest_step(run) if step is None else step
    actor = Path(run) / f"{STEP_PREFIX}{step}" / "actor"
    if not actor.is_dir():
        steps = sorted(int(path.name[len(STEP_PREFIX) :]) for path in Path(run).glob(f"{STEP_PREFIX}*"))
        msg = f"{run} has no checkpoint of step {step}; it has {steps}"
        raise FileNotFoundError(msg)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(temporary)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
            msg = f"verl.model_merger failed on {actor}: {last}"
            raise RuntimeError(msg)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipe.cello1.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="trainer.default_local_dir of the run")
    parser.add_argument("--out", required=True, help="folder of the model; must not exist")
    parser.add_argument("--step", type=int, help="step to export (default: the last complete one)")
    arguments = parser.parse_args(argv)
    try:
        out = export(arguments.run, arguments.out, arguments.step)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
