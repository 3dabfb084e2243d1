"""Draw the pictures of the documentation: ``python docs/images/draw.py``.

The run is that of ``cello1 demo`` with its recorded answers, so that no model is needed. The report is photographed by
Chromium, and left as it is where Chromium is not installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import scanpy as sc
from PIL import Image

import scverse_plugin
from scverse_plugin._commands.demo import ANSWERS, Recorded, annotate_demo

DPI = 90
WINDOW = 1100, 860  # of the report: headlines and table


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every plot and the report."""
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with Recorded(ANSWERS) as engine:
        adata = annotate_demo(engine)
    plots = {
        "support": scverse_plugin.pl.support(adata, return_fig=True),
        "votes": scverse_plugin.pl.votes(adata, return_fig=True),
        "confusion": scverse_plugin.pl.confusion(adata, "bulk_labels", return_fig=True),
        "umap": scverse_plugin.pl.umap(adata, return_fig=True),
    }
    for name, figure in plots.items():
        figure.savefig(args.out / f"{name}.png", dpi=DPI)
        shrink(args.out / f"{name}.png")
    photograph(adata, args.out / "report.png")
    return 0


def photograph(adata: sc.AnnData, path: Path) -> None:
    """Take a picture of the top of the report."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        print(f"{path.name} is left as it is: Chromium is not installed", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        page = scverse_plugin.report(adata, Path(folder) / "report.html")
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={path}"]
        command += [f"--user-data-dir={folder}/profile", "--window-size={},{}".format(*WINDOW), page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    shrink(path)


def shrink(path: Path) -> None:
    """Keep 256 colours: a third of the bytes, and a scale of colours still without steps."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())
