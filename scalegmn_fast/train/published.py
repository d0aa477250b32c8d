"""Training settings of the published Neural Graphs configurations, in this package's format.

Values: the configurations and scripts released with Kofinas et al. 2024. Their augmentations are not part of a packed
dataset. A warm-up of 0 steps is no schedule.
"""

from __future__ import annotations

import copy
from typing import Any

from scalegmn_fast.models import neural_graphs_config

__all__ = ["neural_graphs_training"]

_OPTIMIZATION = {
    "clip_grad": True,
    "clip_grad_max_norm": 10.0,
    "optimizer_name": "AdamW",
    "optimizer_args": {"lr": 1e-3, "weight_decay": 5e-4, "amsgrad": True},
}
_WARMUP = {"scheduler_args": {"scheduler": "WarmupLRScheduler", "warmup_steps": 1000}}
#: task -> batch size, epochs, loss
_TASKS = {
    "inr_classification": (128, 300, "CrossEntropyLoss"),
    "mnist_cls": (128, 200, "CrossEntropyLoss"),
    "fmnist_cls": (128, 200, "CrossEntropyLoss"),
    "cnn_generalization": (256, 200, "MSE"),
    "cnn_zoo": (128, 300, "MSE"),
    "cnn_park": (128, 20, "BCE"),
    "style_editing": (128, 200, "MSE"),
    "mnist_dilation": (128, 200, "MSE"),
}
_CHANGES = {"cnn_zoo/rtransformer": (192, 300, "BCE")}


def neural_graphs_training(name: str) -> dict[str, Any]:
    """The whole configuration of a published Neural Graphs name: its model, and how the original trains it.

    Widths of the backbone are left out: they follow ``model.d_hid``. Raises KeyError for an unknown name.
    """
    model = neural_graphs_config(name)
    for key in ("in_channels", "hidden_channels", "out_channels", "edge_dim"):
        model.get("gnn_backbone", {}).pop(key, None)
    task = name.partition("/")[0]
    batch_size, epochs, loss = _CHANGES.get(name, _TASKS[task])
    optimization = copy.deepcopy(_OPTIMIZATION)
    if not task.startswith("cnn_"):
        optimization |= copy.deepcopy(_WARMUP)
    if task in ("style_editing", "mnist_dilation"):
        optimization["clip_grad_max_norm"] = 1.0
        optimization["scheduler_args"]["warmup_steps"] = 10000
    return {
        "batch_size": batch_size,
        "data": {},
        "train_args": {"num_epochs": epochs, "seed": 0, "loss": loss},
        "model": model,
        "optimization": optimization,
    }
