"""The documentation: marked code blocks run, relative links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\(images/(\w+\.svg)\)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page):
    """(line, code) of the blocks of a page that are marked as running, in order."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)) + 1, found.group(1)) for found in BLOCK.finditer(text)]


RUNNING = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_marked_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    namespace = {"__name__": "page"}
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
    torch.compiler.reset()


def test_pages_have_running_blocks():
    assert {page.stem for page in RUNNING} >= {"how-the-kernels-work", "pytorch", "quickstart"}
    for page in PAGES:
        assert page.read_text().count("<!-- run -->") == len(blocks(page)), f"{page.name}: a mark without a block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    targets = [link.partition("#")[0] for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_figures_are_drawn_for_their_page(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "docs/figures.py"))["draw"](tmp_path)
    shown = set(IMAGE.findall((ROOT / "docs/how-the-kernels-work.md").read_text()))
    assert shown == {path.name for path in tmp_path.iterdir()} == {path.name for path in ROOT.glob("docs/images/*.svg")}
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000, f"{path.name} is empty"
