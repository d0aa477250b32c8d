"""What a model accepts besides one layout, and what it says to a batch that does not fit it."""

import copy
import pickle

import pytest
import torch

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import ScaleGMNConfig, from_config
from scalegmn_fast.testing import random_network, relative_error

LAYOUT = [2, 5, 4, 3]
pytestmark = pytest.mark.usefixtures("reference_backend")


def model_of(**options):
    torch.manual_seed(0)
    return from_config(ScaleGMNConfig(LAYOUT, d_hid=8, num_layers=3, **options)).double().eval()


def batch_of(layout=LAYOUT, count=3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return GraphBatch.from_weights(*random_network(layout, count, generator=generator), **options)


@pytest.mark.parametrize("readout", ["last_layer", "full_graph"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", ["sign", "scale", "hetero", "permutation"])
def test_mixed_layouts_equal_their_parts(symmetry, direction, readout):
    """A batch of several layouts gives every network what it gets alone; shallower networks included."""
    model = model_of(symmetry=symmetry, direction=direction, readout_range=readout, edge_pos_embed=True)
    masks = [torch.tensor([True, False, True]), torch.tensor([False, True]), torch.tensor([True])]
    masks = masks if symmetry == "hetero" else [None] * 3
    parts = [
        batch_of(LAYOUT, 3, 1, sign_mask=masks[0]),
        batch_of([2, 7, 2, 3], 2, 2, sign_mask=masks[1]),
        batch_of([2, 6, 3], 1, 3, sign_mask=masks[2]),
    ]
    expected = torch.cat([model(part) for part in parts])
    assert relative_error(model(GraphBatch.cat(parts)), expected) < 1e-12


def test_equivariant_head_takes_mixed_widths():
    model = model_of(equivariant=True)
    parts = [batch_of(LAYOUT, 2, 1), batch_of([2, 3, 6, 3], 1, 2)]
    for (weights, biases), part in zip(model(GraphBatch.cat(parts)), parts, strict=True):
        alone = model(part)
        assert all(
            relative_error(a, b) < 1e-12 for a, b in zip((*weights, *biases), (*alone[0], *alone[1]), strict=True)
        )


def test_a_second_call_gives_the_same():
    """The batch is not modified."""
    model, batch = model_of(), batch_of()
    nodes, edges = batch.node_features.clone(), batch.edge_features.clone()
    assert torch.equal(model(batch), model(batch))
    assert torch.equal(batch.node_features, nodes) and torch.equal(batch.edge_features, edges)


def test_one_network_alone():
    model, batch = model_of(), batch_of(count=1)
    assert model(batch).shape == (1, 10)


def test_copies_and_pickles():
    model, batch = model_of(), batch_of()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(batch), model(batch))


def test_autocast():
    model, batch = model_of().float(), batch_of().to(dtype=torch.float32)
    expected = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    out.float().sum().backward()
    assert relative_error(out.float(), expected) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bad_batches_are_named():
    model = model_of()
    with pytest.raises(TypeError, match="graph must be a GraphBatch .* got list"):
        model([torch.zeros(1)])
    with pytest.raises(ValueError, match=r"layout must have 2 input and 3 output neurons .* got \[2, 4, 1\]"):
        model(batch_of([2, 4, 1]))
    with pytest.raises(ValueError, match="layout must have at most 4 layers .* got 5"):
        model(batch_of([2, 3, 3, 3, 3]))
    with pytest.raises(ValueError, match="weights must have 1 numbers each .* got 9"):
        model(GraphBatch.from_weights(*random_network(LAYOUT, 2, d_e=9)))
    with pytest.raises(ValueError, match="sign_mask is needed by symmetry 'hetero'"):
        model_of(symmetry="hetero")(batch_of())
    with pytest.raises(ValueError, match=r"layout must have 4 layers like the model's \[2, 5, 4, 3\], got \[2, 6, 3\]"):
        model_of(equivariant=True)(batch_of([2, 6, 3]))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_compiles_as_one_graph(direction):
    """No graph break and no data-dependent shape in a model; ``aot_eager`` traces what inductor would compile."""
    model, batch = model_of(direction=direction, edge_pos_embed=True), batch_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(batch)
    assert relative_error(out, model(batch)) < 1e-12
    out.sum().backward()
