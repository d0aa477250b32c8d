"""A tiny labelled set of networks, learnable in a few steps, and a tiny configuration of ScaleGMN."""

import torch

from scalegmn_fast.data import PackedDataset, write_packed
from scalegmn_fast.models import published_config

LAYOUT = (2, 4, 1)


def tiny_config(**changes):
    """A whole configuration in the original's format, as small as it gets; in ``changes``, ``a__b`` is the key a.b."""
    config = published_config("mnist_cls/scalegmn")
    model = config["scalegmn_args"]
    model["num_layers"] = 2
    for section, key in ((model, "d_hid"), (model["graph_init"], "d_node"), (model["graph_init"], "d_edge"),
                         (model["gnn_args"], "d_hid"), (model["readout_args"], "d_rho")):  # fmt: skip
        section[key] = 8
    model["mlp_args"]["d_k"] = [8]
    model["readout_args"]["d_out"] = 2
    config["data"]["layer_layout"] = None
    config["batch_size"] = 8
    config["train_args"].update(num_epochs=3, seed=3)
    config["optimization"]["optimizer_args"]["lr"] = "1e-2"
    config["optimization"]["scheduler_args"]["warmup_steps"] = 7
    for dotted, value in changes.items():
        node = config
        *sections, last = dotted.split("__")
        for name in sections:
            node = node[name]
        node[last] = value
    return config


def write_tiny(path, *, regression=False, sizes=(40, 16, 16), layout=LAYOUT, classes=2):
    """Writes random networks labelled by how far their output bias lies above the size of the hidden ones."""
    n = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, a, b, 1, generator=generator) for a, b in zip(layout, layout[1:], strict=False)]
    biases = [torch.randn(n, b, 1, generator=generator) for b in layout[1:]]
    signal = biases[-1][:, 0, 0] - 0.3 * biases[0].abs().mean((1, 2))
    labels = torch.sigmoid(2 * signal) if regression else (signal > 0).long() * (classes - 1)
    splits = torch.repeat_interleave(torch.arange(3, dtype=torch.uint8), torch.tensor(sizes))
    metadata = {"activation": "sine", "w0": 30.0, "symmetry": "sign", "input_value": 1.0}
    write_packed(path, weights, biases, labels, splits, metadata)
    return PackedDataset(path)
