"""Every code block of the documentation runs, as a reader would run it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.support import small_runs

DOCS = small_runs.ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
  path
  for path in DOCS.rglob("*.md")
  if any(language != "text" for language, _ in BLOCK.findall(path.read_text()))
)
# Runs a page's blocks in their order; those in Python share their names.
DRIVER = """
import json, subprocess, sys
names = {"__name__": "page"}
for language, block in json.load(sys.stdin):
  if language == "python":
    exec(compile(block, "page", "exec"), names)
  else:
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True)
"""


def test_pages_have_blocks():
  assert {"tutorial.md", "inner_loop.md"} <= {path.name for path in PAGES}


def test_links_lead_somewhere():
  """Also those of pages that mkdocs does not build, and their headings."""
  root = small_runs.ROOT
  pages = [*root.glob("*.md"), *DOCS.rglob("*.md")]
  pages += (root / "benchmarks").glob("*.md")
  for page in pages:
    links = re.findall(r"\]\(([^)\s]*)\)", page.read_text())
    for path, _, anchor in (link.partition("#") for link in links):
      if "://" in path:
        continue
      target = page.parent / path if path else page
      assert target.exists(), f"{page}: {path}"
      if anchor:
        assert anchor in _anchors(target), f"{page}: {path}#{anchor}"


def _anchors(page):
  """Return the anchors that GitHub makes of a page's headings."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.long
@pytest.mark.parametrize(
  "page", PAGES, ids=lambda path: str(path.relative_to(DOCS))
)
def test_blocks(page, tmp_path):
  blocks = BLOCK.findall(page.read_text())
  known = {"python", "sh", "text"}
  assert {language for language, _ in blocks} <= known
  # A clone, but for what the page writes.
  for name in ("train.py", "configs", "examples", "l2t_jax", "launch"):
    (tmp_path / name).symlink_to(small_runs.ROOT / name)
  binaries = pathlib.Path(sys.executable).parent
  environment = os.environ | {
    "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(tmp_path),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "MPLBACKEND": "Agg",
  }
  result = subprocess.run(
    [sys.executable, "-c", DRIVER],
    input=json.dumps([block for block in blocks if block[0] != "text"]),
    capture_output=True,
    text=True,
    timeout=small_runs.PATIENCE,
    cwd=tmp_path,
    env=environment,
  )
  assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
