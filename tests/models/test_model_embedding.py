"""The graph embedding of both model families: what the head reads when the model runs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.testing import load_vector

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = sorted(GOLDEN.glob("*/*.npz"))
pytestmark = pytest.mark.filterwarnings("ignore:not exactly equivariant")


def case(path):
    vector = load_vector(path)
    model = from_config(vector.config).double().eval()
    model.load_state_dict(vector.state)
    d_e = max(w.shape[-1] for w in vector.weights)
    weights = [F.pad(w, ((d_e - 1) // 2, d_e // 2)) if w.shape[-1] == 1 else w for w in vector.weights]
    batch = GraphBatch.from_weights(weights, vector.biases, input_value=vector.input_value, sign_mask=vector.sign_mask)
    return model, batch, vector


def head_of(model):
    if hasattr(model, "proj_out"):
        return model.proj_out
    readout = model.gnn.readout
    return getattr(readout, "global_mlp", readout)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_embedding_is_what_the_head_reads(path):
    model, batch, vector = case(path)
    if len(vector.outputs) > 1:
        with pytest.raises(ValueError, match="expected a model with an invariant head"):
            model.embed(batch)
        return
    seen = []
    head_of(model).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        result, embedding = model(batch), model.embed(batch)
        assert len(seen) == 1 and torch.equal(embedding, seen[0]) and embedding.shape[0] == batch.num_graphs
        assert torch.equal(model.read_out(embedding), result)
