"""The original Neural Graphs, imported from a checkout of github.com/mkofinas/neural-graphs; no line of it is here."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from pathlib import Path

from torch import nn

from bench.original import take_over

#: A file of every checkout.
FILE = "nn/relational_transformer.py"
#: Packages that its models import, by module.
NEEDS = {
    "einops": "einops",
    "hydra": "hydra-core",
    "rff": "random-fourier-features-pytorch",
    "torch_geometric": "torch_geometric",
}
#: A module that the original imports and later versions of PyG have renamed: its name then and now.
RENAMED = ("torch_geometric.utils.trim_to_layer", "torch_geometric.utils._trim_to_layer")
#: How its configurations have their parts built: by the model, from plain lists and dictionaries.
PARTS = {"_recursive_": False, "_convert_": "all"}


def keep_old_names() -> None:
    """Let PyG's renamed module be imported by the name that the original knows."""
    before, now = RENAMED
    importlib.import_module("torch_geometric.utils")
    if before not in sys.modules and importlib.util.find_spec(before) is None:
        sys.modules[before] = importlib.import_module(now)


class OriginalNeuralGraphs:
    """The models of the checkout ``root``; its package ``nn`` takes the place of another's."""

    def __init__(self, root: str | Path):
        take_over(Path(root).resolve(), ("nn",))
        keep_old_names()

    def model(self, config: dict) -> nn.Module:
        """The model of a constructor dictionary with its ``_target_``; called with (weights, biases)."""
        config = copy.deepcopy(config)
        for part in ("graph_constructor", "gnn_backbone"):
            if part in config:
                config[part] |= PARTS
        module, _, name = config.pop("_target_").rpartition(".")
        return getattr(importlib.import_module(module), name)(**config)
