"""Small configurations of the Neural Graphs models, in the original's format."""

import copy

LAYOUT = [2, 5, 4, 3]
STATS = {
    "weights_mean": [-0.01, 0.02, 0.03],
    "weights_std": [0.6, 0.2, 0.9],
    "biases_mean": [0.01, -0.02, 0.03],
    "biases_std": [0.5, 0.7, 0.9],
}
INR = {"_target_": "nn.inr.INRPerLayer", "in_features": 2, "n_layers": 3, "hidden_features": 4, "out_features": 3}
FEATURES = {"d_in": 1, "d_edge_in": 1, "sin_emb": True, "sin_emb_dim": 6, "stats": STATS}
VARYING = {
    "d_in": 1,
    "d_edge_in": 9,
    "max_num_hidden_layers": 5,
    "sin_emb": True,
    "sin_emb_dim": 6,
    "flattening_method": None,
}
BACKBONE = {
    "in_channels": 8,
    "hidden_channels": 8,
    "out_channels": 8,
    "num_layers": 3,
    "aggregators": ["mean", "min", "max", "std"],
    "scalers": ["identity", "amplification"],
    "edge_dim": 8,
    "norm": "layernorm",
    "act": "silu",
    "deg": [4, 2, 6, 2, 4, 3],
    "update_edge_attr": True,
    "modulate_edges": True,
    "final_edge_update": False,
}
GNN = {"d_hid": 8, "d_out": 3, "rev_edge_features": False, "gnn_backbone": BACKBONE}
TRANSFORMER = {
    "d_node": 8,
    "d_edge": 6,
    "d_attn_hid": 8,
    "d_node_hid": 12,
    "d_edge_hid": 10,
    "d_out_hid": 8,
    "d_out": 3,
    "n_layers": 2,
    "n_heads": 2,
}
POOL = {"pooling_method": "cat", "pooling_layer_idx": "last"}
BASES = {
    "gnn": {
        "_target_": "nn.gnn.GNNForClassification",
        **GNN,
        **POOL,
        "layer_layout": LAYOUT,
        "graph_constructor": FEATURES,
    },
    "gnn_edit": {
        "_target_": "nn.dense_gnn.GNNParams",
        **GNN,
        "d_out": 1,
        "stats": STATS,
        "layer_layout": LAYOUT,
        "graph_constructor": FEATURES,
    },
    "gnn_varying": {
        "_target_": "nn.dynamic_gnn.GNNForGeneralization",
        **GNN,
        **POOL,
        "input_channels": 2,
        "num_classes": 3,
        "graph_constructor": VARYING,
    },
    "transformer": {
        "_target_": "nn.relational_transformer.RelationalTransformer",
        **TRANSFORMER,
        **POOL,
        "use_cls_token": False,
        "layer_layout": LAYOUT,
        "graph_constructor": FEATURES,
    },
    "transformer_edit": {
        "_target_": "nn.dense_relational_transformer.RelationalTransformerParams",
        **TRANSFORMER,
        "d_out": 1,
        "stats": STATS,
        "layer_layout": LAYOUT,
        "graph_constructor": FEATURES,
    },
    "transformer_varying": {
        "_target_": "nn.dynamic_relational_transformer.DynamicRelationalTransformer",
        "d_in": 1,
        **TRANSFORMER,
        **POOL,
        "use_cls_token": False,
        "input_channels": 2,
        "num_classes": 3,
        "graph_constructor": {key: value for key, value in VARYING.items() if key != "d_in"},
    },
}


def config_of(kind, changes=None):
    """A base with changes at dotted paths."""
    config = copy.deepcopy(BASES[kind])
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return config
