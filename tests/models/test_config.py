"""Configurations: every accepted form, and an error that names the key for every bad one."""

import copy
import warnings

import pytest
import torch

from scalegmn_fast.models import ScaleGMNConfig, from_config, published_config, published_names
from scalegmn_fast.models.config import resolve


def args(**changes):
    """A small configuration; its widths follow d_hid, so that nothing but the change is unusual."""
    found = copy.deepcopy(published_config("mnist_cls/scalegmn")["scalegmn_args"])
    found.update(layer_layout=[2, 4, 1], d_hid=8, num_layers=2)
    found["mlp_args"]["d_k"] = [8]
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (found[section] if section else found)[key] = value
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", published_names())
def test_published_names_build(name):
    model = from_config(name)
    assert model.config["layer_layout"] == published_config(name)["data"]["layer_layout"]


@pytest.mark.filterwarnings("ignore:d_hid and dropout_all")
def test_all_forms_agree(tmp_path):
    yaml = pytest.importorskip("yaml", reason="the extra [train] is not installed")
    whole = published_config("cifar10/scalegmn_relu")
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(whole))
    inner = {**whole["scalegmn_args"], "layer_layout": whole["data"]["layer_layout"]}
    resolved = [resolve(form) for form in (whole, path, str(path), inner, "cifar10/scalegmn_relu")]
    assert all(found == resolved[0] for found in resolved)
    assert resolved[0]["graph_init"]["d_in_e"] == 9


def test_input_is_not_modified():
    given = args(mlp_args__d_k=[4])
    before = copy.deepcopy(given)
    with pytest.warns(UserWarning, match=r"mlp_args.d_k \[4\] -> \[8\]"):
        from_config(given)
    assert given == before


def test_numbers_may_be_strings():
    """PyYAML reads 1e-1 as a string."""
    assert resolve(args(gnn_args__dropout="1e-1", canonical_eps="1e-6"))["gnn_args"]["dropout"] == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gnn_args__mesage_fn_layers": 1},
            "unknown key 'mesage_fn_layers' in gnn_args; did you mean 'message_fn_layers'",
        ),
        ({"simmetry": "sign"}, "unknown key 'simmetry' in scalegmn_args; did you mean 'symmetry'"),
        ({"symmetry": "signed"}, "symmetry must be one of sign, scale, hetero, permutation, got 'signed'"),
        ({"direction": "backward"}, "direction must be one of forward, bidirectional, got 'backward'"),
        ({"gnn_args__aggregator": "median"}, "gnn_args.aggregator must be one of .* got 'median'"),
        ({"mlp_args__activation": "swish"}, "mlp_args.activation must be one of .* got 'swish'"),
        ({"bidirectional_edges": "carried", "symmetry": "permutation"}, "needs a scaling to carry"),
        ({"bidirectional_edges": "inverse"}, "bidirectional_edges must be one of .* got 'inverse'"),
        ({"gnn_args__msg_num_mlps": 1}, "gnn_args.msg_num_mlps must be 2 or 3 with msg_equiv_on_hidden .* got 1"),
        ({"gnn_args__upd_num_mlps": 4}, "gnn_args.upd_num_mlps must be one of 1, 2, 3, got 4"),
        ({"gnn_args__dropout": 1.5}, r"gnn_args.dropout must be in \[0, 1\), got 1.5"),
        ({"gnn_args__dropout": "much"}, "gnn_args.dropout must be a number, got 'much'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"canonical_eps": -1.0}, "canonical_eps must not be negative, got -1.0"),
        ({"layer_layout": None}, "scalegmn_args needs layer_layout"),
        ({"layer_layout": [2]}, r"layer_layout must hold at least two positive layer sizes, got \[2\]"),
        ({"layer_layout": [2, 0, 1]}, "layer_layout must hold at least two positive layer sizes"),
        ({"mlp_args": {"activation": "silu"}}, "mlp_args needs the key 'd_k'"),
        ({"readout_args": {}}, "readout_args needs the key 'd_out'"),
        ({"gnn_args": 3}, "gnn_args must be a mapping, got int"),
        ({"node_pos_embed": False, "gnn_args__pos_embed_msg": True}, "gnn_args.pos_embed_msg needs node_pos_embed"),
        ({"equivariant": True, "gnn_args__update_edge_attr": False}, "equivariant needs gnn_args.update_edge_attr"),
        ({"graph_init__project_edge_feats": False}, "graph_init.project_edge_feats False needs d_in_e equal to d_edge"),
        ({"d_hid": None}, "scalegmn_args needs d_hid or graph_init.d_node"),
    ],
)
def test_bad_config_is_named(changes, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            from_config(args(**changes))


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="nearest published configuration is 'mnist_cls/scalegmn'"):
        from_config("mnist_cls/scalegmm")
    with pytest.raises(TypeError, match="config must be a ScaleGMNConfig, a dictionary, a path"):
        from_config(3)
    broken = tmp_path / "broken.yml"
    broken.write_text("input_layers: 1input_layers: 1\n")
    pytest.importorskip("yaml", reason="the extra [train] is not installed")
    with pytest.raises(ValueError, match="broken.yml' is not valid YAML: .*line 1"):
        from_config(broken)
    listed = tmp_path / "list.yml"
    listed.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping, got list"):
        from_config(listed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positional_encodings__sum_pos_enc": True}, "positional_encodings.sum_pos_enc"),
        ({"positional_encodings__equiv_net": True}, "positional_encodings.equiv_net"),
        ({"gnn_args__aggregator": "max"}, "gnn_args.aggregator 'max'"),
        ({"symmetry": "scale", "gnn_args__update_as_act": True}, "gnn_args.update_as_act"),
        ({"symmetry": "scale", "direction": "bidirectional"}, "bidirectional_edges 'original'"),
    ],
)
def test_broken_symmetry_is_told(changes, message):
    with pytest.warns(UserWarning, match=f"not exactly equivariant for symmetry .*{message}"):
        from_config(args(**changes))


def test_own_config_is_exact_by_default():
    for symmetry in ("sign", "scale", "hetero", "permutation"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = from_config(ScaleGMNConfig([2, 4, 1], symmetry=symmetry, direction="bidirectional", d_hid=8))
        scaled = symmetry in ("scale", "hetero")
        assert model.config["bidirectional_edges"] == ("carried" if scaled else "original")
        assert model.config["dropout_equivariant_output"] is False
    with pytest.raises(ValueError, match="unknown key 'mlp' in sections; did you mean 'mlp_args'"):
        from_config(ScaleGMNConfig([2, 4, 1], sections={"mlp": {}}))


def test_concatenated_mlp_directions_work():
    """Crashes in the original."""
    config = args(direction="bidirectional", concat_mlp_directions=True)
    assert from_config(config).gnn.project_first.fc[0].in_features == 2 * 8


def test_dropout_spares_the_equivariant_output():
    """Dropout on the head's result zeroes whole bias changes; off in own configurations, on for the original's."""
    from scalegmn_fast.graph import GraphBatch
    from scalegmn_fast.testing import random_network

    weights, biases = random_network([2, 16, 16, 1], 8, dtype=torch.float32)
    for spared in (True, False):
        config = ScaleGMNConfig(
            [2, 16, 16, 1], equivariant=True, d_hid=8, dropout=0.5, dropout_equivariant_output=not spared
        )
        torch.manual_seed(0)
        _, new_biases = from_config(config).train()(GraphBatch.from_weights(weights, biases))
        zeros = sum(int((b == 0).sum()) for b in new_biases)
        assert (zeros == 0) == spared
