"""The twenty published ScaleGMN configurations, in the original's format. Absent keys have their defaults.

Values: Kalogeropoulos et al. 2024, appendix, and the configurations released with it. ``svhn/scalegmn_relu_bidir`` is
given as intended (its released file is malformed).
"""

from __future__ import annotations

import copy

_BASE = {
    "batch_size": 128,
    "data": {
        "dataset": "labeled_mnist_inr",
        "layer_layout": [2, 32, 32, 1],
        "node_pos_embed": True,
        "edge_pos_embed": True,
        "image_size": [28, 28],
        "switch_to_canon": True,
    },
    "train_args": {"num_epochs": 200, "val_acc_threshold": 0.1, "patience": 50, "seed": 0, "loss": "CrossEntropyLoss"},
    "scalegmn_args": {
        "d_hid": 128,
        "num_layers": 4,
        "direction": "forward",
        "equivariant": False,
        "symmetry": "sign",
        "readout_range": "last_layer",
        "gnn_skip_connections": True,
        "reciprocal": True,
        "node_pos_embed": True,
        "edge_pos_embed": True,
        "graph_init": {},
        "positional_encodings": {"num_mlps": 3},
        "gnn_args": {"dropout": 0.2},
        "mlp_args": {"d_k": [128], "activation": "silu", "layer_norm": True},
        "readout_args": {"d_out": 10},
    },
    "optimization": {
        "clip_grad": True,
        "clip_grad_max_norm": 10.0,
        "optimizer_name": "AdamW",
        "optimizer_args": {"lr": 0.001, "weight_decay": 0.01},
        "scheduler_args": {"scheduler": "WarmupLRScheduler", "warmup_steps": 1000},
    },
}

_MLP_ON_IO = {"scalegmn_args.gnn_args.mlp_on_io": True}
_THREE_MLPS = {**_MLP_ON_IO, "scalegmn_args.gnn_args.msg_num_mlps": 3, "scalegmn_args.gnn_args.upd_num_mlps": 3}
_NO_EDGE_EMBED = {"data.edge_pos_embed": False, "scalegmn_args.edge_pos_embed": False}
_NO_SKIP = {"scalegmn_args.gnn_skip_connections": False}
_BIDIRECTIONAL = {"scalegmn_args.direction": "bidirectional"}
_FULL_GRAPH = {"scalegmn_args.readout_range": "full_graph"}
_NARROW = {"scalegmn_args.d_hid": 64, "scalegmn_args.mlp_args.d_k": [64]}
_SCALE, _HETERO = {"scalegmn_args.symmetry": "scale"}, {"scalegmn_args.symmetry": "hetero"}
_CNN = {
    **_NO_EDGE_EMBED,
    "batch_size": 64,
    "data.dataset": "cifar10",
    "data.layer_layout": [1, 16, 16, 16, 10],
    "train_args.loss": "MSE",
    "scalegmn_args._max_kernel_height": 3,
    "scalegmn_args._max_kernel_width": 3,
    "scalegmn_args.readout_args.d_out": 1,
    "scalegmn_args.gnn_args.dropout": 0.0,
    **_MLP_ON_IO,
}
_SVHN = {**_CNN, **_THREE_MLPS, **_FULL_GRAPH}
_CIFAR_INR = {**_NO_EDGE_EMBED, "data.dataset": "cifar_inr", "data.layer_layout": [2, 32, 32, 3]}
_AUGMENTED = {**_CIFAR_INR, **_THREE_MLPS, "batch_size": 256, "data.extra_aug": 20}
_FMNIST = {
    **_THREE_MLPS,
    **_FULL_GRAPH,
    "data.dataset": "labeled_fashion_mnist_inr",
    "scalegmn_args.num_layers": 2,
    "scalegmn_args.gnn_args.dropout_all": True,
}
_EDITING = {
    **_NO_EDGE_EMBED,
    **_MLP_ON_IO,
    "batch_size": 64,
    "data.dataset": "mnist_inr_edit",
    "train_args.num_epochs": 300,
    "train_args.loss": "MSE",
    "scalegmn_args.num_layers": 10,
    "scalegmn_args.equivariant": True,
    "scalegmn_args.out_scale": 0.01,
    "scalegmn_args.gnn_args.dropout": 0.1,
    "scalegmn_args.gnn_args.sign_symmetrization": False,
}
_LR, _DECAY = "optimization.optimizer_args.lr", "optimization.optimizer_args.weight_decay"

_PUBLISHED = {
    "cifar10/scalegmn_hetero": {
        **_CNN,
        **_HETERO,
        **_NO_SKIP,
        "scalegmn_args.gnn_args.dropout": 0.2,
        "scalegmn_args.gnn_args.sign_symmetrization": False,
        _DECAY: 0.001,
    },
    "cifar10/scalegmn_hetero_bidir": {
        **_CNN,
        **_HETERO,
        **_BIDIRECTIONAL,
        "train_args.num_epochs": 250,
        "scalegmn_args.num_layers": 5,
        "scalegmn_args.gnn_args.dropout": 0.1,
        _DECAY: 0.001,
    },
    "cifar10/scalegmn_relu": {**_CNN, **_SCALE, **_NO_SKIP},
    "cifar10/scalegmn_relu_bidir": {**_CNN, **_SCALE, **_NO_SKIP, **_BIDIRECTIONAL},
    "cifar10/scalegmn_tanh": {**_CNN, **_THREE_MLPS, **_FULL_GRAPH, **_NO_SKIP},
    "cifar10/scalegmn_tanh_bidir": {
        **_CNN,
        **_THREE_MLPS,
        **_FULL_GRAPH,
        **_NO_SKIP,
        **_BIDIRECTIONAL,
        "batch_size": 32,
        "scalegmn_args.gnn_args.dropout": 0.2,
        _LR: 0.0005,
    },
    "cifar_inr_cls/scalegmn": {
        **_CIFAR_INR,
        **_THREE_MLPS,
        **_NARROW,
        **_NO_SKIP,
        "batch_size": 64,
        "scalegmn_args.gnn_args.sign_symmetrization": False,
        _DECAY: 0.0005,
    },
    "cifar_inr_cls/scalegmn_aug": {
        **_AUGMENTED,
        **_FULL_GRAPH,
        "train_args.max_steps": 200000,
        "scalegmn_args.gnn_args.dropout": 0.1,
        _DECAY: 0.001,
    },
    "cifar_inr_cls/scalegmn_aug_bidir": {
        **_AUGMENTED,
        **_BIDIRECTIONAL,
        "train_args.num_epochs": 300,
        "train_args.max_steps": 300000,
        _DECAY: 0.0001,
    },
    "cifar_inr_cls/scalegmn_bidir": {
        **_CIFAR_INR,
        **_NARROW,
        **_NO_SKIP,
        **_BIDIRECTIONAL,
        "batch_size": 64,
        "scalegmn_args.positional_encodings.sum_on_io": False,
        "scalegmn_args.gnn_args.sign_symmetrization": False,
        "scalegmn_args.mlp_args.layer_norm": False,
        _DECAY: 0.0005,
    },
    "fmnist_cls/scalegmn": _FMNIST,
    "fmnist_cls/scalegmn_bidir": {**_FMNIST, **_BIDIRECTIONAL},
    "mnist_cls/scalegmn": {},
    "mnist_cls/scalegmn_bidir": {
        **_NO_EDGE_EMBED,
        **_NO_SKIP,
        **_BIDIRECTIONAL,
        "scalegmn_args.gnn_args.pos_embed_msg": True,
        "scalegmn_args.gnn_args.pos_embed_upd": True,
        _DECAY: 0.001,
    },
    "mnist_editing/scalegmn": {**_EDITING, **_THREE_MLPS, "scalegmn_args.gnn_args.dropout_all": True, _DECAY: 0.001},
    "mnist_editing/scalegmn_bidir": {**_EDITING, **_BIDIRECTIONAL, _DECAY: 0.001},
    "svhn/scalegmn_relu": {**_SVHN, **_NARROW, **_SCALE, "data.dataset": "svhn", "batch_size": 16, _DECAY: 0},
    "svhn/scalegmn_relu_bidir": {
        **_SVHN,
        **_NARROW,
        **_SCALE,
        **_BIDIRECTIONAL,
        "data.dataset": "svhn",
        "scalegmn_args.num_layers": 3,
        _DECAY: 0,
    },
    "svhn/scalegmn_tanh": {
        **_CNN,
        **_THREE_MLPS,
        **_NARROW,
        **_NO_SKIP,
        "batch_size": 128,
        "scalegmn_args.mlp_args.layer_norm": False,
        _DECAY: 0.0005,
    },
    "svhn/scalegmn_tanh_bidir": {
        **_SVHN,
        **_BIDIRECTIONAL,
        "batch_size": 128,
        "scalegmn_args.num_layers": 3,
        "scalegmn_args.gnn_args.dropout_all": True,
    },
}


def published_names() -> tuple[str, ...]:
    """Names of the published configurations, as ``task/model``."""
    return tuple(_PUBLISHED)


def published_config(name: str) -> dict:
    """A published configuration by name, a fresh dictionary in the original's format.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
    """
    if name not in _PUBLISHED:
        raise KeyError(f"name must be a published configuration ({', '.join(_PUBLISHED)}), got {name!r}")
    config = copy.deepcopy(_BASE)
    for path, value in _PUBLISHED[name].items():
        section = config
        *parents, key = path.split(".")
        for parent in parents:
            section = section[parent]
        section[key] = copy.deepcopy(value)
    if config["scalegmn_args"]["equivariant"]:
        del config["scalegmn_args"]["readout_args"], config["scalegmn_args"]["readout_range"]
    else:
        config["scalegmn_args"].pop("out_scale", None)
    return config
