"""The documentation: marked blocks run, commands parse, links and paths lead somewhere, every page is in the site."""

import argparse
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from scalegmn_fast.cli import COMMANDS
from scalegmn_fast.train import build_model
from scalegmn_fast.train.config import apply_overrides, load_config, validate_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\(images/(\w+\.svg)\)")
COMMAND = re.compile(r"^(?:scalegmn-fast|torchrun .*?-m scalegmn_fast) (.+)$", re.MULTILINE)
PATH = re.compile(r"`((?:\w[\w.-]*/)+\w+\.(?:py|cpp|h|cu|md|json))`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page):
    """(line, code) of the blocks of a page that are marked as running, in order."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)) + 1, found.group(1)) for found in BLOCK.finditer(text)]


RUNNING = [page for page in PAGES if blocks(page)]


def original_script(monkeypatch):
    """What a script of the original's has, by stand-ins."""
    pytest.importorskip("torch_geometric", reason="the page's dataset is of PyG items")
    monkeypatch.syspath_prepend(ROOT / "tests/interop")
    import standins
    from test_interop_loader import LAYOUT, Items, graph, scalegmn_config

    args = {**scalegmn_config("mnist_cls/scalegmn_bidir"), "layer_layout": LAYOUT}
    names = {"scalegmn_args": args, "net": standins.scalegmn_model(args), "train_set": Items(8, graph)}
    return names | {"batch": standins.scalegmn_batch(args, dtype=torch.float32)}


#: What the blocks of a page find made.
GIVEN = {"drop-in": original_script}


@pytest.mark.filterwarnings("ignore:d_hid and dropout_all")
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_marked_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    namespace = {"__name__": "page"} | GIVEN.get(page.stem, lambda _: {})(monkeypatch)
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
    torch.compiler.reset()


def test_pages_have_running_blocks():
    assert {page.stem for page in RUNNING} >= {"drop-in", "how-the-kernels-work", "pytorch", "quickstart", "tracing"}
    for page in PAGES:
        assert page.read_text().count("<!-- run -->") == len(blocks(page)), f"{page.name}: a mark without a block"


def anchors(page):
    """Of a page's headings, as GitHub and MkDocs make them of plain text."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip() for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    missing = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.filterwarnings("ignore:d_hid and dropout_all")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page):
    """Arguments are those of the commands, and configurations with overrides make models."""
    for command in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        name, *arguments = shlex.split(command, comments=True)
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[name][0]).configure(parser)
        args = parser.parse_args(arguments)
        if getattr(args, "overrides", None):
            config = validate_config(apply_overrides(load_config(args.config), args.overrides))
            if "scalegmn_args" in config:  # the others take more from the data
                build_model(config, [2, 32, 32, 1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_and_modules_exist(page):
    text = page.read_text()
    folders = [ROOT, ROOT / "scalegmn_fast"]
    paths = [path for path in PATH.findall(text) if not re.search("STEM|GPU", path)]
    modules = [name.replace("scalegmn_fast.kernels", "kernels") for name in re.findall(r"python -m ([\w.]+)", text)]
    paths += [f"{name.replace('.', '/')}.py" for name in modules if name != "scalegmn_fast"]
    assert not [path for path in paths if not any((folder / path).exists() for folder in folders)]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"^ +- .*: (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("package", ["graph", "models", "interop", "train", "data", "ops", "nn", "testing"])
def test_the_reference_lists_every_public_name(package):
    text, module = (ROOT / "docs/reference.md").read_text(), importlib.import_module(f"scalegmn_fast.{package}")
    listed = set(re.findall(rf"^::: scalegmn_fast\.{package}\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    public = {name for name in module.__all__ if callable(getattr(module, name))}
    assert public <= listed
    for name in public:
        assert inspect.getdoc(getattr(module, name)), f"{name} has no docstring"


def test_figures_are_drawn_for_their_page(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "docs/figures.py"))["draw"](tmp_path)
    shown = set(IMAGE.findall((ROOT / "docs/how-the-kernels-work.md").read_text()))
    assert shown == {path.name for path in tmp_path.iterdir()} == {path.name for path in ROOT.glob("docs/images/*.svg")}
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000, f"{path.name} is empty"
