"""Pages as Chromium lays them out in a window of some width. Nothing is downloaded: without it the test is skipped."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pytest

# What is wider than its place: the page itself, and every block of code that could be scrolled.
MEASURE = """
const measure = page => {
  const root = page.documentElement, wide = [];
  for (const block of page.querySelectorAll("pre")) {
    if (block.scrollWidth > block.clientWidth + 1) wide.push(block.textContent.slice(0, 80));
  }
  const fields = [...page.querySelectorAll("dl.field-list > dd")].map(each => each.clientWidth);
  const window = root.clientWidth;
  // A name that takes too much room leaves none for the other columns, one that takes too little makes rows tall.
  const all = (kind, value) => [...page.querySelectorAll(kind)].map(value);
  const tall = Math.max(0, ...all("tbody tr", each => each.clientHeight));
  const head = Math.max(0, ...all("tbody th", each => each.clientWidth / window));
  // A picture that is shrunk much cannot be read.
  const shrunk = Math.min(1, ...all("img", each => each.clientWidth / Math.min(each.naturalWidth, 576)));
  return {over: root.scrollWidth - window, window, cut: wide, field: Math.min(...fields, 9999), tall, head, shrunk};
};
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.title = JSON.stringify(frames.map(frame => measure(frame.contentDocument)));
};
"""


def layouts(pages: Sequence[Path], width: int, folder: Path) -> list[dict]:
    """Measure pages: pixels over the width, code that is cut, the narrowest field of an API, tables, pictures."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    style = f"border:0;width:{width}px;height:900px"
    frames = "".join(f'<iframe style="{style}" src="{page.as_uri()}"></iframe>' for page in pages)
    (folder / "frames.html").write_text(f"<!doctype html><title></title>{frames}<script>{MEASURE}</script>")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    command.append((folder / "frames.html").as_uri())
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.+?)</title>", run.stdout)
    assert title, run.stderr[-1000:]
    found = json.loads(unescape(title[1]))
    assert len(found) == len(pages) and all(width - 30 <= each["window"] <= width for each in found)
    return found


def overflow(page: Path, width: int, folder: Path) -> int:
    """Return by how many pixels a page is wider than its window."""
    return layouts([page], width, folder)[0]["over"]
