"""The examples run as they stand; the demo on few images."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_quickstart_prints_one_row_per_network(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    assert capsys.readouterr().out.strip() == "(5, 10)"


@pytest.mark.parametrize("config", ["digits.yml", "digits_neural_graphs.yml"])
def test_demo_end_to_end_and_again(tmp_path, capsys, config):
    for module in ("sklearn", "yaml", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    arguments = ["--out", str(tmp_path), "--images", "60", "--copies", "1", "--epochs", "1", "--device", "cpu"]
    arguments += ["--config", str(EXAMPLES / config)]
    assert demo.main(arguments) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"test accuracy {100 * result['test']['accuracy']:.1f}% on {result['test']['count']} networks" in text
    error = float(text.split("relative to the largest output: ")[1].split()[0])
    assert error < 1e-4
    assert "reference " in text and " ms" in text
    for picture in ("networks.png", "run/curves.png", "run/confusion.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and str(tmp_path / picture) in text
    assert demo.main(arguments) == 0
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["epochs"] == result["epochs"] and "holds a finished run" in capsys.readouterr().out
