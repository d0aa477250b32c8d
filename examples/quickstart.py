"""Ten lines: the weights of five networks 2-32-32-1 in, ten numbers per network out."""

import torch

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config

layout = (2, 32, 32, 1)
weights = [torch.randn(5, n_in, n_out) / 30 for n_in, n_out in zip(layout, layout[1:], strict=False)]
biases = [torch.randn(5, n_out) / 30 for n_out in layout[1:]]

model = from_config("mnist_cls/scalegmn").eval()  # the published configuration, or your own YAML file or dictionary
with torch.no_grad():
    output = model(GraphBatch.from_weights(weights, biases))
print(tuple(output.shape))  # (5, 10)
