"""Neural Graphs: networks over the graph of another network, equivariant to the permutations of its neurons.

NG-GNN (`nn.Pna`) passes messages along the weights; NG-T (`nn.TransformerLayer`) attends over all pairs of neurons.
Each comes as a classifier, as an editor (new weights and biases), and as a classifier of networks of varying
architectures. Names of classes, constructor arguments and parameters are those of the original implementation, so that
its configurations and checkpoints load; ``compile`` and ``jit`` are accepted and do nothing.

What the original computes is kept where it is well defined, among it:

* ``norm: layernorm`` normalises over all nodes of the whole batch: a network's result depends on its neighbours in the
  batch. ``gnn_backbone.norm_scope`` "graph" or "node" (ours) makes networks independent.
* `GNNParams` reads new biases from the nodes ``layer_layout[0]`` places before their own, which is not equivariant.
  ``exact_bias_readout: True`` (ours) reads a neuron's bias from its own node.
* The statistics of weights of varying architectures are applied one layer late; ``shift_weight_stats: False`` (ours)
  applies them to their own layer.
* Activations inside ``pre_nn`` and ``post_nn`` are ReLU whatever ``act`` says; ``gating_edges`` without
  ``modulate_edges`` has no effect; nor has ``disable_edge_updates`` with the pooling "mean_edge" or of "all" layers;
  ``tfixit_init`` leaves the edge mlps as they are.
* ``num_probe_features`` of varying architectures has no effect.

What differs: in a batch of several sizes the original's transformer attends to padding, and its readouts of "all" nodes
or pairs count padding. Here a network gets what it gets alone. These work here and fail in the original: the pooling
"cat_mean", layers by number and "max" of the last layer for a fixed layout, "cat" of all nodes, editing without
statistics, activations with ``extra_layer``, and statistics with residual connections.

Source: Kofinas, Knyazev, Zhang et al., "Graph Neural Networks for Learning Equivariant Representations of Neural
Networks", ICLR 2024 (arXiv 2403.12143).
"""

from .neural_graphs_gnn import GNNForClassification, GNNForGeneralization, GNNParams
from .neural_graphs_transformer import (
    DynamicRelationalTransformer,
    RelationalTransformer,
    RelationalTransformerParams,
)

__all__ = [
    "DynamicRelationalTransformer",
    "GNNForClassification",
    "GNNForGeneralization",
    "GNNParams",
    "RelationalTransformer",
    "RelationalTransformerParams",
]
