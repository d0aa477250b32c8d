"""Small models and batches that every test of PyTorch's features takes."""

import torch
from torch import nn

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import ScaleGMNConfig, from_config
from scalegmn_fast.testing import random_network

LAYOUT = (2, 4, 4, 1)
NEURAL_GRAPHS = {
    "gnn": {
        "_target_": "nn.gnn.GNNForClassification",
        "d_hid": 8,
        "d_out": 3,
        "rev_edge_features": False,
        "pooling_method": "cat",
        "pooling_layer_idx": "last",
        "layer_layout": list(LAYOUT),
        "graph_constructor": {"d_in": 1, "d_edge_in": 1},
        "gnn_backbone": {
            "in_channels": 8,
            "hidden_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "aggregators": ["mean", "std"],
            "scalers": ["identity"],
            "edge_dim": 8,
            "deg": [4, 2, 6],
        },
    },
    "transformer": {
        "_target_": "nn.relational_transformer.RelationalTransformer",
        "d_node": 8,
        "d_edge": 8,
        "d_attn_hid": 8,
        "d_node_hid": 8,
        "d_edge_hid": 8,
        "d_out_hid": 8,
        "d_out": 3,
        "n_layers": 2,
        "n_heads": 2,
        "use_cls_token": False,
        "pooling_method": "cat",
        "pooling_layer_idx": "last",
        "layer_layout": list(LAYOUT),
        "graph_constructor": {"d_in": 1, "d_edge_in": 1},
    },
}


def network(batch, seed=0, dtype=torch.float32):
    """(weights, biases) of a batch of random networks."""
    weights, biases = random_network(LAYOUT, batch, generator=torch.Generator().manual_seed(seed))
    return [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]


def graphs(batch, seed=0, dtype=torch.float32):
    return GraphBatch.from_weights(*network(batch, seed, dtype))


def labels(batch):
    return torch.arange(batch) % 3


def scalegmn(**options):
    torch.manual_seed(0)
    return from_config(ScaleGMNConfig(LAYOUT, **{"d_out": 3, "d_hid": 8, "num_layers": 2, **options}))


def neural_graphs(name):
    torch.manual_seed(0)
    return from_config(NEURAL_GRAPHS[name])


class FromWeights(nn.Module):
    """A model of weights and biases in place of a batch of graphs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, weights, biases):
        return self.model(GraphBatch.from_weights(weights, biases))


def leaves(out):
    return torch.utils._pytree.tree_leaves(out)
