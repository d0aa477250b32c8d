"""The sdist has what a build needs, and the workflow's commands exist. Nothing is compiled here."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Paths in an sdist, below its top folder. It is made from a copy: egg-info would be written beside the source."""
    folder = tmp_path_factory.mktemp("sdist")
    copied = folder / "source"
    for name in ("scalegmn_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("golden", "__pycache__"))
    for path in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(path, copied)
    command = [sys.executable, "-c", BUILD_SDIST, folder]
    done = subprocess.run(command, cwd=copied, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def files(folder, *patterns):
    return {str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern)}


def test_the_sdist_has_the_packages_the_kernels_and_the_native_sources(sdist):
    wanted = files("scalegmn_fast", "*.py") | files("kernels", "*.py") | files("csrc", "*.h", "*.cpp", "*.cu", "*.cuh")
    wanted |= {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert wanted - sdist == set()
    assert {path for path in files("csrc", "*.*") if (ROOT / path).is_file()} - sdist == set()


def test_the_sdist_has_every_source_that_cmake_names(sdist):
    text = (ROOT / "CMakeLists.txt").read_text()
    named = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu|h)\b", text))
    (stems,) = re.findall(r"set\(stems ([\w ]+)\)", text)
    for template in re.findall(r'"(csrc/\w+/\\\\1\.\w+)"', text):
        named |= {template.replace("\\\\1", stem) for stem in stems.split()}
    assert len(named) > len(stems.split()) and named - sdist == set()


def test_the_sdist_has_no_build_products_and_no_part_of_the_tests(sdist):
    assert not [path for path in sdist if path.endswith((".so", ".pyc")) or path.startswith(("build/", "tests/"))]


def test_the_workflow_runs_what_exists():
    yaml = pytest.importorskip("yaml", reason="the workflow is YAML")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML reads the key `on` as true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    asked = re.findall(r"\bmake ([\w-]+)", commands)
    assert asked and set(asked) <= set(targets)
    from scalegmn_fast import cli

    called = re.findall(r"scalegmn-fast ([\w-]+)", commands)
    assert called == ["info", "check"]
    for name in called:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
