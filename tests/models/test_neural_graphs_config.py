"""Configurations of Neural Graphs: every accepted form, and an error that names the key for every bad one."""

import copy

import pytest
import torch
from neural_graphs_cases import BASES, INR, config_of

from scalegmn_fast.models import (
    GNNForClassification,
    from_config,
    neural_graphs_config,
    neural_graphs_names,
    published_names,
)
from scalegmn_fast.models.neural_graphs_config import layout_degrees


def test_every_form_gives_the_model(tmp_path):
    yaml = pytest.importorskip("yaml", reason="the extra [train] is not installed")
    config = config_of("gnn")
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    models = [from_config(form) for form in (config, {"model": config, "data": {}}, path, str(path))]
    models.append(GNNForClassification(**arguments))
    names = list(models[0].state_dict())
    assert all(type(model) is GNNForClassification and list(model.state_dict()) == names for model in models)


def test_input_is_not_modified():
    for kind in BASES:
        config = config_of(kind)
        before = copy.deepcopy(config)
        from_config(config)
        assert config == before


@pytest.mark.parametrize("name", neural_graphs_names())
def test_published_names_build(name):
    model = from_config(name)
    assert type(model).__name__ == neural_graphs_config(name)["_target_"].rsplit(".")[-1]
    assert name not in published_names()


def test_published_configurations_are_fresh():
    neural_graphs_config("mnist_cls/pna")["graph_constructor"]["stats"] = None
    assert neural_graphs_config("mnist_cls/pna")["graph_constructor"]["stats"] is not None
    with pytest.raises(KeyError, match="name must be a published configuration .* got 'mnist_cls/gat'"):
        neural_graphs_config("mnist_cls/gat")


def test_keys_of_hydra_are_ignored():
    changes = {
        "_recursive_": False,
        "_convert_": "all",
        "gnn_backbone._target_": "nn.gnn.PNA",
        "graph_constructor._recursive_": False,
        "graph_constructor.d_node": 99,
    }
    assert from_config(config_of("gnn", changes)).construct_graph.proj_node_in.in_features == 8


def test_degrees_of_a_layout():
    assert layout_degrees([2, 6, 6, 1]) == [2, 0, 6, 0, 0, 0, 7]
    scales = from_config(config_of("gnn", {"gnn_backbone.deg": None})).gnn.convs[0].aggr_module
    assert scales.avg_deg_lin.item() == pytest.approx((5 * 2 + 4 * 5 + 3 * 4) / 14)


def test_numbers_may_be_strings():
    """PyYAML reads 1e-1 as a string."""
    assert from_config(config_of("transformer", {"dropout": "1e-1"})).layers[0].dropout0.p == 0.1


def test_accepted_without_effect():
    changes = {"compile": True, "jit": True}
    torch.manual_seed(0)
    plain = from_config(config_of("gnn")).state_dict()
    torch.manual_seed(0)
    assert all(
        torch.equal(value, plain[name]) for name, value in from_config(config_of("gnn", changes)).state_dict().items()
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gnn", {"_target_": "nn.gnn.GAT"}, "_target_ must be one of nn.gnn.GNNForClassification, .* got 'nn.gnn.GAT'"),
        ("gnn", {"d_hidden": 8}, "unknown key 'd_hidden' in GNNForClassification; did you mean 'd_hid'"),
        ("gnn", {"d_hid": "8"}, "GNNForClassification.d_hid must be an integer of at least 1, got '8'"),
        ("gnn", {"d_hid": True}, "GNNForClassification.d_hid must be an integer of at least 1, got True"),
        ("gnn", {"d_out": "${data.num_classes}"}, r"GNNForClassification.d_out must be resolved .* got '\$"),
        ("gnn", {"layer_layout": [2]}, "layer_layout must be a list of at least two positive layer sizes, got "),
        ("gnn", {"layer_layout": "2,3"}, "layer_layout must be a list of at least two positive layer sizes, got "),
        ("gnn", {"rev_edge_features": 1}, "rev_edge_features must be True or False, got 1"),
        ("gnn", {"gnn_backbone": None}, "GNNForClassification.gnn_backbone must be a mapping, got NoneType"),
        ("gnn", {"gnn_backbone.num_heads": 2}, "unknown key 'num_heads' in gnn_backbone"),
        ("gnn", {"gnn_backbone.aggregators": ["median"]}, "gnn_backbone.aggregators must be a list of different names"),
        ("gnn", {"gnn_backbone.aggregators": ["max", "max"]}, "gnn_backbone.aggregators must be a list of different"),
        ("gnn", {"gnn_backbone.scalers": []}, "gnn_backbone.scalers must be a list of different names out of identity"),
        ("gnn", {"gnn_backbone.act": "swoosh"}, "gnn_backbone.act: expected one of .* got 'swoosh'"),
        ("gnn", {"gnn_backbone.act": None}, "gnn_backbone.update_edge_attr needs an act, got act None"),
        ("gnn", {"gnn_backbone.act_kwargs": {"beta": 1}}, "gnn_backbone.act_kwargs must be None"),
        ("gnn", {"gnn_backbone.norm": "graphnorm"}, "gnn_backbone.norm must be one of layernorm, .* got 'graphnorm'"),
        (
            "gnn",
            {"gnn_backbone.norm_kwargs": {"mode": "row"}},
            "norm_kwargs.mode must be one of graph, node, got 'row'",
        ),
        ("gnn", {"gnn_backbone.norm_scope": "layer"}, "norm_scope must be one of batch, graph, node, got 'layer'"),
        ("gnn", {"gnn_backbone.dropout": 1.0}, r"gnn_backbone.dropout must be a number in \[0, 1\), got 1.0"),
        ("gnn", {"gnn_backbone.jk": "sum"}, "gnn_backbone.jk must be one of last, cat, max, lstm, got 'sum'"),
        ("gnn", {"gnn_backbone.edge_dim": 4}, "gnn_backbone.edge_dim must equal d_hid, 8, got 4"),
        ("gnn", {"gnn_backbone.out_channels": 4}, "gnn_backbone.out_channels must equal d_hid, 8, got 4"),
        ("gnn", {"gnn_backbone.towers": 3}, "gnn_backbone.towers must divide hidden_channels, 8, got 3"),
        ("gnn", {"gnn_backbone.deg": [3]}, "gnn_backbone.deg must be a histogram of degrees"),
        ("gnn_varying", {"gnn_backbone.deg": None}, "gnn_backbone needs the key 'deg' where layouts vary"),
        ("gnn", {"pooling_method": "median"}, "pooling_method must be one of cat, mean, .* got 'median'"),
        (
            "gnn",
            {"pooling_layer_idx": "first"},
            "pooling_layer_idx must be 'all', 'last' or a layer's number .* 'first'",
        ),
        (
            "gnn",
            {"pooling_layer_idx": -1},
            "pooling_layer_idx must be 'all', 'last' or a layer's number from 0, got -1",
        ),
        ("gnn", {"pooling_layer_idx": 4}, r"pooling_layer_idx must be a layer of \[2, 5, 4, 3\], got 4"),
        ("gnn", {"pooling_method": "cat_mean"}, "pooling_layer_idx must be 'all' with pooling_method 'cat_mean'"),
        (
            "gnn",
            {"pooling_method": "mean_edge", "pooling_layer_idx": 1},
            "pooling_layer_idx must be 'all' or 'last' with pooling_method 'mean_edge', got 1",
        ),
        ("gnn_varying", {"pooling_method": "mean_edge"}, "pooling_method must be one of cat, .* got 'mean_edge'"),
        ("gnn_varying", {"pooling_layer_idx": "all"}, "layer_layout is needed by pooling_method 'cat' of layer 'all'"),
        ("gnn", {"graph_constructor.sinus": 1}, "unknown key 'sinus' in graph_constructor"),
        ("gnn", {"graph_constructor.stats": {"mean": []}}, "stats must have keys out of weights_mean, .* got 'mean'"),
        ("gnn", {"graph_constructor.stats": {"weights_mean": 1.0}}, "stats.weights_mean must be one number per layer"),
        (
            "gnn",
            {"graph_constructor.num_probe_features": 4},
            "graph_constructor.num_probe_features needs inr_model, got None",
        ),
        (
            "gnn",
            {"graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": {**INR, "pe_features": 3}},
            "inr_model.pe_features must be None",
        ),
        (
            "gnn",
            {"graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": {**INR, "out_features": 1}},
            r"inr_model.out_features must be 3 for layer_layout \[2, 5, 4, 3\], got 1",
        ),
        (
            "gnn",
            {"graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": {"_target_": "nn.inr.INR"}},
            "inr_model._target_ must be 'nn.inr.INRPerLayer', got 'nn.inr.INR'",
        ),
        (
            "gnn_varying",
            {"graph_constructor.flattening_method": "repeat"},
            "graph_constructor.flattening_method must be one of repeat_nodes, extra_layer, None, got 'repeat'",
        ),
        ("transformer", {"n_heads": 3}, "n_heads must divide d_attn_hid, 8, got 3"),
        ("transformer", {"node_update_type": "gps"}, "node_update_type must be one of rt, got 'gps'"),
        ("transformer", {"use_cls_token": True}, "use_cls_token must be True with pooling_method 'cls_token'"),
        ("transformer", {"pooling_method": "set_transformer"}, "pooling_method must be one of .* 'set_transformer'"),
        ("transformer_edit", {"out_scale": "big"}, "out_scale must be a number"),
    ],
)
def test_bad_config_is_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        from_config(config_of(kind, changes))


def test_missing_keys_are_named():
    for section, key, name in ((None, "d_hid", "GNNForClassification"), ("gnn_backbone", "scalers", "gnn_backbone")):
        config = config_of("gnn")
        del (config[section] if section else config)[key]
        with pytest.raises(ValueError, match=f"{name} needs the key '{key}'"):
            from_config(config)


def test_set_pooling_needs_its_heads():
    with pytest.raises(ValueError, match="d_hid must be divisible by 8 .* got 6"):
        config = config_of("gnn_varying", {"pooling_method": "set_transformer", "d_hid": 6})
        config["gnn_backbone"] |= dict.fromkeys(("in_channels", "hidden_channels", "out_channels", "edge_dim"), 6)
        from_config(config)
