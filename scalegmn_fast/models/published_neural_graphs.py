"""The published Neural Graphs configurations, as the original's constructor dictionaries with everything resolved.

Values: Kofinas et al. 2024 and the configurations and scripts released with it. ``inr_classification``,
``style_editing`` and ``cnn_generalization`` are the released files for MNIST and the small CNN zoo; the other names are
the runs of the released scripts.
"""

from __future__ import annotations

import copy

_MNIST = {
    "weights_mean": [-4.215954686515033e-05, -7.55547659991862e-07, 7.886120874900371e-05],
    "weights_std": [0.06281130015850067, 0.018268151208758354, 0.11791174858808517],
    "biases_mean": [5.419965418695938e-06, 3.7173406326473923e-06, -0.01239530649036169],
    "biases_std": [0.021334609016776085, 0.011004417203366756, 0.09989194571971893],
}
_FASHION = {
    "weights_mean": [6.370305982272839e-06, 6.88720547259436e-06, 1.0729863788583316e-05],
    "weights_std": [0.07822809368371964, 0.03240188956260681, 0.13454964756965637],
    "biases_mean": [1.6790845336345228e-07, -1.1566662578843534e-05, -0.020282816141843796],
    "biases_std": [0.028561526909470558, 0.016700252890586853, 0.09595609456300735],
}
_DILATION = {
    "weights_mean": [-0.0001166215879493393, -3.2710825053072767e-06, 7.234242366394028e-05],
    "weights_std": [0.06279338896274567, 0.01827024295926094, 0.11813738197088242],
    "biases_mean": [4.912401891488116e-06, -3.210141949239187e-05, -0.012279038317501545],
    "biases_std": [0.021347912028431892, 0.0109943225979805, 0.09998151659965515],
}
_INR = {
    "_target_": "nn.inr.INRPerLayer",
    "in_features": 2,
    "n_layers": 3,
    "hidden_features": 32,
    "out_features": 1,
}
_FEATURES = {
    "_target_": "nn.graph_constructor.GraphConstructor",
    "d_in": 1,
    "d_edge_in": 1,
    "zero_out_bias": False,
    "zero_out_weights": False,
    "sin_emb": True,
    "sin_emb_dim": 128,
    "use_pos_embed": True,
    "input_layers": 1,
    "inp_factor": 3,
    "num_probe_features": 0,
}
_INR_FEATURES = {**_FEATURES, "inr_model": _INR, "stats": _MNIST}
_CNN_FEATURES = {
    **_FEATURES,
    "_target_": "nn.dynamic_graph_constructor.GraphConstructor",
    "d_edge_in": 9,
    "max_num_hidden_layers": 3,
    "linear_as_conv": True,
    "flattening_method": None,
    "max_spatial_resolution": 49,
    "use_act_embed": True,
    "stats": dict.fromkeys(_MNIST),
}
_BACKBONE = {
    "_target_": "nn.gnn.PNA",
    "num_layers": 4,
    "aggregators": ["mean", "min", "max", "std"],
    "scalers": ["identity", "amplification"],
    "dropout": 0.0,
    "norm": "layernorm",
    "act": "silu",
    "deg": None,
    "update_edge_attr": True,
    "modulate_edges": True,
    "gating_edges": False,
    "final_edge_update": False,
}
_WIDTHS = ("in_channels", "hidden_channels", "out_channels", "edge_dim")
_POOLING = {"pooling_method": "cat", "pooling_layer_idx": "last"}
_TRANSFORMER = {
    "d_node": 64,
    "d_edge": 32,
    "d_attn_hid": 128,
    "d_node_hid": 128,
    "d_edge_hid": 64,
    "d_out_hid": 128,
    "n_layers": 4,
    "n_heads": 8,
    "node_update_type": "rt",
    "disable_edge_updates": False,
    "dropout": 0.0,
    "rev_edge_features": False,
    "use_ln": True,
    "tfixit_init": False,
    "modulate_v": True,
}
_GNN = {"d_hid": 32, "rev_edge_features": False, "compile": False, "jit": False, "gnn_backbone": _BACKBONE}
_LAYOUT = [2, 32, 32, 1]

_INR_GNN = {
    "_target_": "nn.gnn.GNNForClassification",
    "d_out": 10,
    **_GNN,
    **_POOLING,
    "layer_layout": _LAYOUT,
    "graph_constructor": _INR_FEATURES,
}
_INR_TRANSFORMER = {
    "_target_": "nn.relational_transformer.RelationalTransformer",
    "d_out": 10,
    **_TRANSFORMER,
    **_POOLING,
    "use_cls_token": False,
    "layer_layout": _LAYOUT,
    "graph_constructor": {**_INR_FEATURES, "inp_factor": 1},
}
_EDIT_FEATURES = {key: value for key, value in _INR_FEATURES.items() if key != "stats"}
_EDITING = {"d_out": 1, "layer_layout": _LAYOUT, "stats": _DILATION, "normalize": False}
_EDIT_GNN = {
    "_target_": "nn.dense_gnn.GNNParams",
    **_GNN,
    **_EDITING,
    "d_hid": 128,
    "out_scale": 0.01,
    "graph_constructor": {**_EDIT_FEATURES, "sin_emb": False},
}
_EDIT_TRANSFORMER = {
    "_target_": "nn.dense_relational_transformer.RelationalTransformerParams",
    **_TRANSFORMER,
    **_EDITING,
    "n_heads": 4,
    "graph_constructor": _EDIT_FEATURES,
}
_ZOO = {"d_out": 1, "input_channels": 1, "num_classes": 10, "layer_layout": [1, 16, 16, 16, 10]}
_ZOO_DEGREES = [12000, 192000, *[0] * 14, 504000]
_CNN_GNN = {
    "_target_": "nn.dynamic_gnn.GNNForGeneralization",
    **_GNN,
    **_POOLING,
    **_ZOO,
    "gnn_backbone": {**_BACKBONE, "deg": _ZOO_DEGREES},
    "graph_constructor": _CNN_FEATURES,
}
_CNN_TRANSFORMER = {
    "_target_": "nn.dynamic_relational_transformer.DynamicRelationalTransformer",
    "d_in": 1,
    **_TRANSFORMER,
    **_POOLING,
    **_ZOO,
    "use_cls_token": False,
    "graph_constructor": {key: value for key, value in _CNN_FEATURES.items() if key != "d_in"} | {"inp_factor": 1},
}

_DROPPED = {"gnn_backbone.dropout": 0.2, "rev_edge_features": True}
_FASHION_STATS = {"graph_constructor.stats": _FASHION}
_PROBES = {"graph_constructor.num_probe_features": 64}
_PARK = {
    "input_channels": 3,
    "layer_layout": None,
    "graph_constructor.d_edge_in": 49,
    "graph_constructor.max_num_hidden_layers": 5,
}
_PARK_DEGREES = {
    0: 118980, 3: 607096, 4: 394242, 5: 98840, 8: 390958, 9: 87468, 16: 381834, 17: 59684, 32: 351606, 33: 81132,
}  # fmt: skip
_WIDE = {"d_node": 128, "d_edge": 64, "d_attn_hid": 256, "d_node_hid": 256, "d_edge_hid": 128, "d_out_hid": 256}
_NARROW = {"d_node": 32, "d_edge": 16, "d_attn_hid": 32, "d_node_hid": 64, "d_edge_hid": 64, "d_out_hid": 64}

_PUBLISHED = {
    "inr_classification/pna": (_INR_GNN, {}),
    "inr_classification/rtransformer": (_INR_TRANSFORMER, {}),
    "style_editing/pna": (_EDIT_GNN, {}),
    "style_editing/rtransformer": (_EDIT_TRANSFORMER, {}),
    "cnn_generalization/pna": (_CNN_GNN, {}),
    "cnn_generalization/rtransformer": (_CNN_TRANSFORMER, {}),
    "mnist_cls/pna": (_INR_GNN, _DROPPED),
    "mnist_cls/pna_probe_64": (_INR_GNN, {**_DROPPED, **_PROBES}),
    "mnist_cls/rtransformer": (_INR_TRANSFORMER, {"dropout": 0.2}),
    "mnist_cls/rtransformer_probe_64": (_INR_TRANSFORMER, {"dropout": 0.2, **_PROBES}),
    "fmnist_cls/pna": (_INR_GNN, {**_DROPPED, **_FASHION_STATS}),
    "fmnist_cls/pna_probe_64": (_INR_GNN, {**_DROPPED, **_FASHION_STATS, **_PROBES}),
    "fmnist_cls/rtransformer": (_INR_TRANSFORMER, {"dropout": 0.2, **_FASHION_STATS}),
    "fmnist_cls/rtransformer_probe_64": (_INR_TRANSFORMER, {"dropout": 0.2, **_FASHION_STATS, **_PROBES}),
    "mnist_dilation/pna": (_EDIT_GNN, _DROPPED),
    "mnist_dilation/rtransformer": (_EDIT_TRANSFORMER, {"dropout": 0.3, "rev_edge_features": True}),
    "cnn_zoo/pna": (_CNN_GNN, {"d_hid": 256, "graph_constructor.linear_as_conv": False}),
    "cnn_zoo/rtransformer": (_CNN_TRANSFORMER, _WIDE),
    "cnn_park/pna": (
        _CNN_GNN,
        {**_PARK, "d_hid": 64, "gnn_backbone.deg": [_PARK_DEGREES.get(degree, 0) for degree in range(34)]},
    ),
    "cnn_park/rtransformer": (_CNN_TRANSFORMER, {**_PARK, **_NARROW, "n_heads": 4, "n_layers": 3, "dropout": 0.2}),
}


def neural_graphs_names() -> tuple[str, ...]:
    """Names of the published Neural Graphs configurations, as ``task/model``."""
    return tuple(_PUBLISHED)


def neural_graphs_config(name: str) -> dict:
    """A published Neural Graphs configuration by name, a fresh constructor dictionary with its ``_target_``.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
    """
    if name not in _PUBLISHED:
        raise KeyError(f"name must be a published configuration ({', '.join(_PUBLISHED)}), got {name!r}")
    base, changes = _PUBLISHED[name]
    config = copy.deepcopy(base)
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        (config[section] if section else config)[key] = copy.deepcopy(value)
    if "gnn_backbone" in config:
        config["gnn_backbone"] |= dict.fromkeys(_WIDTHS, config["d_hid"])
    return config
