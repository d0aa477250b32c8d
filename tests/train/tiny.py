"""A tiny labelled set of networks, learnable in a few steps, and a tiny configuration."""

import copy

import torch

from scalegmn_fast.data.packed import PackedDataset, write_packed

LAYOUT = (2, 4, 1)


def tiny_config(**changes):
    """A whole configuration in the original's format, as small as it gets; ``changes`` are dotted keys."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        node = config
        *sections, last = key.split("__")
        for name in sections:
            node = node[name]
        node[last] = value
    return config


CONFIG = {
    "batch_size": 8,
    "data": {"dataset": "labeled_mnist_inr", "node_pos_embed": True, "edge_pos_embed": True, "switch_to_canon": True},
    "train_args": {"num_epochs": 3, "patience": 50, "seed": 3, "loss": "CrossEntropyLoss"},
    "scalegmn_args": {"d_hid": 8, "symmetry": "sign"},
    "optimization": {
        "clip_grad": True,
        "clip_grad_max_norm": "10.0",
        "optimizer_name": "AdamW",
        "optimizer_args": {"lr": "1e-2", "weight_decay": 0.01},
        "scheduler_args": {
            "scheduler": "WarmupLRScheduler", "warmup_steps": 7, "scheduler_mode": "min", "decay_rate": 0,
            "decay_steps": 0, "patience": "None", "min_lr": "None",
        },
    },
}  # fmt: skip


class TinyModel(torch.nn.Module):
    """Reads a GraphBatch into ``d_out`` numbers; has dropout, so that it depends on the random state."""

    def __init__(self, d_out=2):
        super().__init__()
        self.hidden = torch.nn.Linear(12 + 5, 16)
        self.dropout = torch.nn.Dropout(0.3)
        self.out = torch.nn.Linear(16, d_out)

    def forward(self, graph):
        weights, biases = graph.to_weights()
        x = torch.cat([t.flatten(1) for t in (*weights, *biases)], 1)
        return self.out(self.dropout(torch.tanh(self.hidden(x))))


def write_tiny(path, *, regression=False, sizes=(40, 16, 16), layout=LAYOUT, classes=2):
    """Writes random networks whose label is whether (how much) their first bias exceeds zero."""
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




def make_model(config, d_out):
    return TinyModel(d_out)
