"""Neural Graphs as row programs: the same numbers as without, for every option, mixed architectures and dropout."""

import gc
import weakref

import pytest
import torch
from neural_graphs_cases import LAYOUT, config_of
from test_neural_graphs_equivariance import CASES

from scalegmn_fast import backend
from scalegmn_fast.graph import GraphBatch, from_cnns
from scalegmn_fast.models import from_config
from scalegmn_fast.nn.recompute import Tables
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.testing import assert_close_to_float64, random_cnn, random_network, randomize_parameters

ALL = [(kind, changes) for kind, cases in CASES.items() for changes in cases]
ALL += [("gnn", {"gnn_backbone.act": "leaky_relu"}), ("gnn", {"gnn_backbone.pre_layers": 3})]


def model_of(kind, changes):
    torch.manual_seed(0)
    model = from_config(config_of(kind, changes)).eval()
    randomize_parameters(model, generator=torch.Generator().manual_seed(0))
    return model


def batch_of(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    weights, biases = random_network(LAYOUT, 3, d_e=9 if "varying" in kind else 1, generator=generator)
    return GraphBatch.from_weights([w.to(dtype) for w in weights], [b.to(dtype) for b in biases])


def results(name, model, graph):
    """Outputs and all gradients."""
    with backend(name):
        out = model(graph)
        outs = [out] if torch.is_tensor(out) else [*out[0], *out[1]]
        weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in outs]
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(outs, parameters, weights, allow_unused=True, materialize_grads=True)
    return [*outs, *grads]


def assert_equal(found, expected, tolerance=1e-10):
    largest = max(float(value.detach().abs().max()) for value in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance * max(float(b.detach().abs().max()), 1e-3 * largest)


@pytest.mark.parametrize(
    ("kind", "changes"),
    ALL,
    ids=lambda value: value if isinstance(value, str) else "-".join(k.split(".")[-1] for k in value) or "default",
)
def test_row_programs_change_nothing(kind, changes, monkeypatch):
    model, graph = model_of(kind, changes).double(), batch_of(kind, torch.float64)
    expected = results("reference", model, graph)
    calls, run = [], RowProgram.run
    monkeypatch.setattr(RowProgram, "run", lambda self, ptr=None: calls.append(self) or run(self, ptr))
    assert_equal(results("cpp", model, graph), expected)
    assert calls


@pytest.mark.parametrize("kind", ["gnn_varying", "transformer_varying"])
def test_mixed_architectures(kind):
    generator = torch.Generator().manual_seed(0)
    cnns = [random_cnn([2, *channels], [3], generator=generator) for channels in ([4], [5, 3, 6], [7, 2])]
    graph = from_cnns(cnns, kernel_size=(3, 3))
    model = model_of(kind, {}).double()
    assert_equal(results("cpp", model, graph), results("reference", model, graph))


@pytest.mark.parametrize("kind", ["gnn", "transformer"])
def test_error_in_float32(kind):
    model, graph = model_of(kind, {}), batch_of(kind, torch.float32)
    eager, found = results("reference", model, graph), results("cpp", model, graph)
    exact = results("reference", model.double(), batch_of(kind, torch.float64))
    for number, values in enumerate(zip(found, eager, exact, strict=True)):
        assert_close_to_float64(*values, ulps=256, name=f"result {number}")


def test_dropout_follows_the_seed():
    model, graph = model_of("transformer", {"dropout": 0.3}).train(), batch_of("transformer", torch.float32)

    def run(seed):
        torch.manual_seed(seed)
        return results("cpp", model, graph)

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_second_derivatives():
    """A gradient of a gradient of the input networks' weights, as learnt optimisers take it."""
    for kind in ("gnn", "transformer"):
        model, found = model_of(kind, {}).double(), {}
        for name in ("reference", "cpp"):
            weights, biases = random_network(LAYOUT, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weights = [w.requires_grad_() for w in weights]
            with backend(name):
                out = model(GraphBatch.from_weights(weights, biases)).square().sum()
                first = torch.autograd.grad(out, weights, create_graph=True)
                found[name] = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        assert_equal(found["cpp"], found["reference"], tolerance=1e-8)


@pytest.mark.parametrize(("kind", "rounds"), [("gnn", 1), ("gnn_edit", 2), ("transformer", 0)])
def test_what_a_forward_keeps(kind, rounds, monkeypatch):
    """Of edges the weights and what a round reads; of nodes ten rows of floats a round; nothing of pairs."""
    model, graph, kept = model_of(kind, {}), batch_of(kind, torch.float32), {}
    hooks = torch.autograd.graph.saved_tensors_hooks

    def pack(tensor):
        if tensor.is_floating_point() and tensor.dim() == 2:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = tensor, storage.nbytes() // tensor.element_size()
        return tensor

    def also_packing(keep, give):
        return hooks(lambda tensor: pack(found) if torch.is_tensor(found := keep(tensor)) else found, give)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", also_packing)
    with hooks(pack, lambda tensor: tensor):
        model(graph)
    of_edges = [tuple(tensor.shape) for tensor, _ in kept.values() if tensor.shape[0] == graph.num_edges]
    inputs = [(graph.num_edges, 1)] if rounds else []
    assert sorted(of_edges) == [*inputs, *[(graph.num_edges, 8)] * rounds]
    of_nodes = [size for tensor, size in kept.values() if tensor.shape[0] == graph.num_nodes]
    assert max(of_nodes) <= 4 * 8 * graph.num_nodes
    if rounds:
        assert sum(of_nodes) < 10.5 * 8 * graph.num_nodes * (rounds + 1)
    assert max(size for _, size in kept.values()) < 6 * sum(sum(layout) ** 2 for layout in [LAYOUT] * 3)


def test_edges_end_with_their_backward():
    """No cycle of references keeps what a round read until Python's collector comes by."""
    gc.disable()
    try:
        table = torch.rand(9, 4, requires_grad=True) * 1
        program, ends = RowProgram(), weakref.ref(table)
        section = program.section(9)
        section.write(section.add(section.load(table), section.load(table)))
        program.run()[1].sum().backward()
        del program, section, table
        assert ends() is None
    finally:
        gc.enable()


def test_tables_that_are_made_again_know_their_arguments():
    x = torch.rand(5, 4, requires_grad=True)
    weight = torch.rand(3, 4, requires_grad=True)
    for changes in (False, True):
        tables, program = Tables(), RowProgram()
        table = tables.made(torch.nn.functional.linear, x, weight)
        assert tables.made(torch.nn.functional.linear, x, weight) is table
        section = program.section(5)
        section.write(section.mul(section.load(table), section.load(table)))
        with tables.forgotten():
            out = program.run()[1]
        if not changes:
            grads = torch.autograd.grad(out.sum(), [x, weight])
            assert_equal(grads, torch.autograd.grad((x @ weight.t()).square().sum(), [x, weight]), tolerance=1e-6)
            continue
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified in place"):
            out.sum().backward()
