"""A training script in the originals' manner, over their model's stand-in and their loader."""

import sys
from pathlib import Path

import standins
import torch
import torch.nn.functional as F
import wandb
from test_accelerate import scalegmn_config
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

CONFIG = {**scalegmn_config("mnist_cls/scalegmn_bidir"), "layer_layout": [2, 4, 3, 2]}


def graph(index):
    batch = standins.scalegmn_batch(CONFIG, count=1, seed=index, dtype=torch.float32)
    fields = {key: value for key, value in vars(batch).items() if key not in ("batch", "ptr", "num_graphs", "label")}
    return Data(**fields, label=index % 2)


def main(steps):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    graphs = [graph(index) for index in range(2 * steps)]
    loader = DataLoader(graphs, batch_size=4, shuffle=True)
    net = standins.scalegmn_model(CONFIG)
    device = torch.device("cpu")
    net = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.9)
    for epoch in range(2):
        net.train()
        for batch in loader:
            batch = batch.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch), batch.label)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            scheduler.step()
            wandb.log({"train/loss": loss.item(), "grad_norm": norm, "epoch": epoch})
        net.eval()
        with torch.no_grad():
            found = torch.cat([net(batch.to(device)) for batch in loader])
        wandb.log({"mean": found.mean()})
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, "latest.ckpt")
    net.load_state_dict(torch.load(Path("latest.ckpt"))["model"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
