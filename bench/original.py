"""The original implementation, imported from a checkout of github.com/jkalogero/scalegmn; no line of it is here.

Its optional dependencies are replaced by empty modules where they are not installed: the models need none of them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

#: A file of every checkout.
FILE = "src/scalegmn/models.py"
UNUSED_BY_MODELS = {
    "rff": ("rff.layers",),
    "torchvision": ("torchvision.utils",),
    "einops": ("einops.layers", "einops.layers.torch"),
}
#: A line of configs/svhn/scalegmn_relu_bidir.yml that is no YAML, and whose key the original's own code refuses.
MALFORMED = "input_layers: 1input_layers: 1"


def take_over(root: Path, packages: Sequence[str]) -> None:
    """Make folders of a checkout importable as packages, the top one first, in the place of any other's.

    Their ``__init__`` is not run.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == packages[0]]:
        del sys.modules[name]
    for name in packages:
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package


class Original:
    """The models, configurations and batches of the checkout ``root``; takes the place of another's modules."""

    def __init__(self, root: str | Path):
        self.root = Path(root).resolve()
        for name, children in UNUSED_BY_MODELS.items():
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                sys.modules.update({module: _Placeholder(module) for module in (name, *children)})
        take_over(self.root, ("src", "src.data"))
        self._models, self._data, self._graphs, self._helpers = (
            importlib.import_module(f"src.{name}")
            for name in ("scalegmn.models", "data.data_utils", "scalegmn.graph_init", "utils.helpers")
        )

    def config(self, name: str, change: Callable[[dict], object] | None = None) -> dict:
        """A configuration file by its published name, changed, and completed as the original's scripts do."""
        import yaml

        text = (self.root / "configs" / f"{name}.yml").read_text()
        config = yaml.safe_load(text.replace(MALFORMED, ""))
        if change is not None:
            change(config)
        config = self._helpers.update_common_args(config)
        config["scalegmn_args"]["layer_layout"] = config["data"]["layer_layout"]
        return config

    def model(self, config: dict) -> nn.Module:
        args = copy.deepcopy(config["scalegmn_args"])
        return (self._models.ScaleGMN_equiv if args["equivariant"] else self._models.ScaleGMN)(args)

    def batch(
        self, config: dict, weights: list[Tensor], biases: list[Tensor], input_value: float, sign_mask: Tensor | None
    ):
        """PyG batch of networks with weights [B, n_in, n_out, d_e] and biases [B, n_out, 1]."""
        from torch_geometric.data import Batch

        args, data = config["scalegmn_args"], self._data
        layout = args["layer_layout"]
        layer = torch.repeat_interleave(torch.arange(len(layout)), torch.tensor(layout)).unsqueeze(1)
        nodes, edges = self._graphs.batch_to_graphs(weights, biases, input_emb=input_value)
        shared = {
            "edge_index": data.nn_to_edge_index(layout, "cpu"),
            "node2type": data.get_node_types(layout) if args["node_pos_embed"] else None,
            "edge2type": data.get_edge_types(layout) if args["edge_pos_embed"] else None,
            "direction": args["direction"],
            "hidden_nodes": (layer > 0) & (layer < len(layout) - 1) if self._helpers.mask_hidden(config) else None,
            "first_layer_nodes": layer == 0 if self._helpers.mask_input(config) else None,
        }
        graphs = [data.to_pyg_batch(x, e, **shared)[0] for x, e in zip(nodes, edges, strict=True)]
        for index, graph in enumerate(graphs):
            if sign_mask is not None:
                graph.sign_mask = sign_mask[index : index + 1]
        return Batch.from_data_list(graphs)

    @staticmethod
    def call(model: nn.Module, batch, weights: list[Tensor], biases: list[Tensor]):
        """The model's output; it overwrites the batch that it is given, so it gets a shallow copy."""
        return model(copy.copy(batch), weights, biases)


class _Placeholder(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
