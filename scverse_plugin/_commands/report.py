"""Write the report of an annotated h5ad file."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path, help="h5ad file that was annotated")
    parser.add_argument("-o", "--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--key", default="cello1", help="key_added of the run")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import anndata as ad

    import scverse_plugin

    print(scverse_plugin.report(ad.read_h5ad(args.input), args.output, args.key))
