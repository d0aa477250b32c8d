"""The benchmark of large networks, on small ones."""

import pytest
import torch

from bench import large_networks
from scalegmn_fast.graph import trace
from scalegmn_fast.models import from_config
from scalegmn_fast.testing.networks import VisionTransformer, resnet18, vgg19_convolutions


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(large_networks.NETWORKS, "resnet18", lambda: resnet18(4, 5))
    monkeypatch.setitem(large_networks.NETWORKS, "vgg19_convolutions", lambda: vgg19_convolutions((4, 0, 6)))


@pytest.mark.filterwarnings("ignore:d_hid")
@pytest.mark.parametrize("name", ["resnet18", "vgg19_convolutions"])
def test_parts_of_a_row(small, name):
    row = large_networks.tracing(name)
    assert row["symmetry"] == "scale" and row["edges"] > 0 and row["trace_s"] > 0
    for what in ("forward", "step"):
        row |= large_networks.reading(name, "svhn/scalegmn_relu", what)
        assert row[f"{what}_s"] > 0 and row[f"{what}_bytes"] >= 0
    text = large_networks.page({"rows": [{"network": name, **row}]})
    assert f"| {name} | {row['nodes']} | {row['edges']} |" in text


def test_the_model_has_four_rounds_of_64_features_over_the_whole_graph(small):
    _, traced = large_networks.traced_network("resnet18")
    model = from_config(large_networks.config_of("svhn/scalegmn_relu", traced))
    assert len(model.gnn.fw_layers) == model.config["num_layers"] == 4
    assert (model.config["gnn_args"]["d_hid"], model.config["edge_memory"]) == (64, "recompute")
    assert model.config["readout_range"] == "full_graph"


def test_a_part_that_failed_is_named():
    row = {"network": "n", "nodes": 1, "edges": 1, "trace_s": 1, "batch_s": 1, "trace_bytes": 1}
    text = large_networks.page({"rows": [row | {"forward_failed": "out of memory"}, {"network": "m", "failed": "why"}]})
    assert "| out of memory |  | not run |  |" in text and "| m | why |" in text


def test_sizes_of_the_real_networks():
    """Parameters as published: 11.7, 20.0 and 5.7 million."""
    sizes = [
        sum(p.numel() for p in net.parameters()) for net in (resnet18(), vgg19_convolutions(), VisionTransformer())
    ]
    assert sizes == [11_689_512, 20_024_384, 5_717_416]


def test_vgg_is_a_stack_of_layers():
    module = vgg19_convolutions((4, 0, 6, 5))
    assert trace(module, torch.zeros(1, 3, 8, 8)).batch([module]).layouts == ((3, 4, 6, 5),)
