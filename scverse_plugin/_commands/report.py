"""Write the report of an annotated h5ad file."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path, help="h5ad file or zarr store that was annotated")
    parser.add_argument("-o", "--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--key", default="cello1", help="key_added of the run")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import scverse_plugin
    from scverse_plugin import _files
    from scverse_plugin._report import check_path

    check_path(args.output)
    print(scverse_plugin.report(_files.read_object(args.input), args.output, args.key))
