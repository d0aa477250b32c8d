"""Each exact identity of the plan of work changes nothing but the cost."""

from dataclasses import fields, replace
from itertools import chain

import pytest
import torch

from scalegmn_fast import backend
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import ScaleGMNConfig, from_config, published_config, published_names
from scalegmn_fast.nn import WorkPlan, set_work_plan
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.reference.row_program import sections
from scalegmn_fast.testing import random_network

pytestmark = pytest.mark.filterwarnings("ignore:not exactly equivariant", "ignore:d_hid and dropout_all")
IDENTITIES = [item.name for item in fields(WorkPlan)]
CARRIED = {"symmetry": "scale", "direction": "bidirectional", "bidirectional_edges": "carried"}
RECIPROCAL = {**CARRIED, "bidirectional_edges": "reciprocal"}
SUMMED = {"sections": {"positional_encodings": {"sum_pos_enc": True}}}
DEPTHS = ([2, 5, 4, 4, 3], [2, 4, 3, 3], [2, 6, 3])


def small_model(name):
    args = published_config(name)["scalegmn_args"]
    args["d_hid"], args["num_layers"] = 6, min(args["num_layers"], 4)
    args["layer_layout"] = [1, 4, 3, 5] if "_max_kernel_height" in args else [2, 5, 4, 3]
    torch.manual_seed(0)
    return from_config(args).double().eval()


def outputs_and_gradients(model, work, seed=0):
    set_work_plan(model, work)
    generator = torch.Generator().manual_seed(seed)
    options = model.options
    weights, biases = random_network(options.layout, 4, d_e=options.d_in_e, generator=generator)
    leaves = [value.double().requires_grad_() for value in (*weights, *biases)]
    count = len(weights)
    mask = torch.tensor([True, False, True, False]) if options.symmetry == "hetero" else None
    out = model(GraphBatch.from_weights(leaves[:count], leaves[count:], sign_mask=mask))
    outs = [out] if isinstance(out, torch.Tensor) else [*out[0], *out[1]]
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outs]
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = sum((o * c).sum() for o, c in zip(outs, cotangents, strict=True))
    return [*outs, *torch.autograd.grad(total, leaves + parameters, allow_unused=False)]


@pytest.mark.parametrize("name", published_names())
def test_identities_change_nothing(name):
    model = small_model(name)
    with backend("reference"):
        expected = outputs_and_gradients(model, WorkPlan.none())
        scale = max(float(value.detach().abs().max()) for value in expected)
        for identity in IDENTITIES:
            found = outputs_and_gradients(model, replace(WorkPlan.none(), **{identity: True}))
            for a, b in zip(found, expected, strict=True):
                assert float((a - b).detach().abs().max()) <= 1e-11 * scale, identity
        found = outputs_and_gradients(model, WorkPlan())
        assert all(float((a - b).detach().abs().max()) <= 1e-11 * scale for a, b in zip(found, expected, strict=True))


def test_liveness_shrinks_the_last_round():
    """Rows that the last node update receives, with and without liveness."""
    model = small_model("mnist_cls/scalegmn")
    weights, biases = random_network(model.options.layout, 3)
    rows = {}
    for liveness in (False, True):
        set_work_plan(model, replace(WorkPlan.none(), liveness=liveness))
        seen = []
        update = model.gnn.fw_layers[-1].update_node_feats_fn
        hook = update.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.shape[0]))
        model(GraphBatch.from_weights(weights, biases))
        hook.remove()
        rows[liveness] = seen
    layout = model.options.layout
    assert rows == {False: [3 * sum(layout)], True: [3 * layout[-1]]}


def test_every_trainable_parameter_gets_a_gradient():
    """Parameters of branches without rows get zeros, not None: DistributedDataParallel and weight decay see them."""
    for name in ("mnist_cls/scalegmn", "cifar10/scalegmn_tanh_bidir"):
        model = small_model(name)
        weights, biases = random_network(model.options.layout, 2, d_e=model.options.d_in_e)
        model(GraphBatch.from_weights(weights, biases)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_batch_norm_turns_the_identities_off():
    """Batch statistics depend on which rows a module sees, so a model with batch norm sees the original's rows."""
    args = published_config("mnist_cls/scalegmn")["scalegmn_args"]
    args.update(d_hid=4, layer_layout=[2, 3, 1])
    args["mlp_args"]["batch_norm"] = True
    assert from_config(args).gnn.work == WorkPlan.none()


@pytest.mark.parametrize("name", published_names())
def test_row_programs_change_nothing(name, monkeypatch):
    model = small_model(name)
    with backend("reference"):
        expected = outputs_and_gradients(model, WorkPlan.none())
    calls = []
    run = RowProgram.run
    monkeypatch.setattr(RowProgram, "run", lambda self, ptr=None: calls.append(self) or run(self, ptr))
    with backend("cpp"):
        found = [outputs_and_gradients(model, WorkPlan())]
        assert calls
        calls.clear()
        found.append(outputs_and_gradients(model, WorkPlan(across=False)))
        assert calls
        calls.clear()
        outputs_and_gradients(model, replace(WorkPlan(), fuse=False))
        assert not calls
    scale = max(float(value.detach().abs().max()) for value in expected)
    for values in found:
        assert all(float((a - b).detach().abs().max()) <= 1e-11 * scale for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("name", ["mnist_cls/scalegmn", "cifar_inr_cls/scalegmn"], ids=["edge_types", "one_edge_type"])
def test_the_first_edge_update_leaves_its_last_map_to_the_next_round(name, monkeypatch):
    """One product per edge fewer in rounds 1 and 2, where all edges of a section have one type, and no edge written."""
    model = small_model(name)
    weights, biases = random_network(model.options.layout, 2, dtype=torch.float64)
    graph = GraphBatch.from_weights(weights, biases)
    shape, programs = (model.options.d_hid,) * 2, []
    run = RowProgram.run
    monkeypatch.setattr(RowProgram, "run", lambda self, ptr=None: programs.append((self, ptr)) or run(self, ptr))
    written, products = {}, {}
    for across in (False, True):
        programs.clear()
        set_work_plan(model, WorkPlan(across=across))
        model(graph)
        of_edges = []
        for program, ptr in programs:
            tensors, _, *described = program.arguments(ptr)[:5]
            if ptr is not None:
                of_edges.append([(section, tensors) for section in sections(*described)])
        written[across] = sum(section.end - section.begin for section, _ in of_edges[0] if section.rows >= 0)
        products[across] = sum(
            section.end - section.begin
            for section, tensors in chain(*of_edges)
            for step in section.steps
            if step.op == "linear" and tensors[step.t0].shape == shape
        )
    edges, typed = graph.plan.num_edges, model.options.edge_types is not None
    composed = sum(count for _, count, _ in graph.plan.inner_edges()) if typed else edges
    assert written == {False: edges, True: 0}
    assert products[False] - products[True] == composed > 0


@pytest.mark.parametrize("options", [{}, CARRIED, RECIPROCAL, SUMMED], ids=["sign", "carried", "reciprocal", "added"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_batches_of_several_depths_with_edge_types(options, mode):
    """Blocks of edges whose sources are of one layer in one network and of another in the next have no one type."""
    config = ScaleGMNConfig([2, 5, 4, 4, 3], num_layers=4, d_hid=6, edge_pos_embed=True, **options)
    model = from_config(config).double().eval()
    model.gnn.edge_memory = mode
    generator = torch.Generator().manual_seed(0)
    parts = [random_network(layout, 2, generator=generator, dtype=torch.float64) for layout in DEPTHS]
    batch = GraphBatch.cat([GraphBatch.from_weights(*part) for part in parts])
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for work in (WorkPlan.none(), WorkPlan(), replace(WorkPlan(), fuse=False)):
        set_work_plan(model, work)
        out = model(batch)
        found.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    for values in found[1:]:
        for actual, wanted in zip(values, found[0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_single_round_returns_updated_edges(direction):
    model = from_config(ScaleGMNConfig([2, 5, 4, 3], equivariant=True, direction=direction, num_layers=1, d_hid=6))
    model.double().eval()
    expected = outputs_and_gradients(model, WorkPlan.none())
    for work in (WorkPlan(), replace(WorkPlan(), fuse=False)):
        for actual, wanted in zip(outputs_and_gradients(model, work), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", published_names())
def test_recomputed_edges_change_nothing(name):
    model = small_model(name)
    model.gnn.edge_memory = "store"
    expected = outputs_and_gradients(model, WorkPlan())
    model.gnn.edge_memory = "recompute"
    found = outputs_and_gradients(model, WorkPlan())
    scale = max(float(value.detach().abs().max()) for value in expected)
    assert all(float((a - b).detach().abs().max()) <= 1e-11 * scale for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["svhn/scalegmn_relu", "svhn/scalegmn_relu_bidir", "cifar10/scalegmn_hetero"])
def test_recomputed_edges_take_no_memory(name):
    """Nothing of an edge's width is kept for the backward pass, in contrast to ``store``."""
    model = small_model(name)
    plan, largest = None, {}
    for mode in ("store", "recompute"):
        model.gnn.edge_memory = mode
        seen = [0]

        def pack(tensor, seen=seen):
            if tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] == model.options.d_hid:
                seen[0] = max(seen[0], tensor.shape[0])
            return tensor

        weights, biases = random_network([1, 4, 13, 5], 4, d_e=model.options.d_in_e, dtype=torch.float64)
        mask = torch.tensor([True, False, True, False]) if model.options.symmetry == "hetero" else None
        graph = GraphBatch.from_weights(weights, biases, sign_mask=mask)
        plan = graph.plan
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(graph)
        largest[mode] = seen[0]
    assert largest == {"store": plan.num_edges, "recompute": plan.num_nodes}


def test_edges_are_recomputed_where_they_would_not_fit(monkeypatch):
    model = small_model("svhn/scalegmn_relu")
    weights, biases = random_network(model.options.layout, 2, d_e=model.options.d_in_e, dtype=torch.float64)
    graph = GraphBatch.from_weights(weights, biases)
    x = graph.node_features
    needed = 2 * model.options.num_layers * graph.plan.num_edges * model.options.d_hid * 8
    for available, keeps in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr("scalegmn_fast.models.memory.available_memory", lambda available=available: available)
        assert model.gnn.keeps_edges(graph.plan, x) is keeps
    model.gnn.edge_memory = "store"
    assert model.gnn.keeps_edges(graph.plan, x)


def test_dropout_inside_row_programs_follows_the_seed():
    """`dropout_all` drops inside the mlps: the same masks for the same seed, in forward and backward."""
    model = small_model("fmnist_cls/scalegmn")
    weights, biases = random_network(model.options.layout, 3)
    set_work_plan(model, WorkPlan()).train()
    assert model.options.mlp["dropout"] > 0

    def run(seed):
        torch.manual_seed(seed)
        out = model(GraphBatch.from_weights(weights, biases))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("options", "read_once"), [({}, True), (RECIPROCAL, True), (CARRIED, False)], ids=["sign", "reciprocal", "carried"]
)
def test_edges_that_draw_dropout_are_written_unless_read_once(options, read_once, monkeypatch):
    """Two programs that compute the same edges would draw two masks."""
    args = {"sections": {"mlp_args": {"dropout": 0.5}}, "num_layers": 3, "d_hid": 6, **options}
    model = from_config(ScaleGMNConfig([2, 5, 4, 3], **args)).train()
    weights, biases = random_network([2, 5, 4, 3], 2, dtype=torch.float32)
    programs, run = [], RowProgram.run
    monkeypatch.setattr(RowProgram, "run", lambda self, ptr=None: programs.append((self, ptr)) or run(self, ptr))
    model(GraphBatch.from_weights(weights, biases))
    first = next(program for program, ptr in programs if ptr is not None)
    assert all((section.written < 0) is read_once for section in first.sections)


@pytest.mark.parametrize("symmetry", ["sign", "scale"])
@pytest.mark.parametrize("edge_types", [False, True], ids=["one_edge_type", "edge_types"])
def test_models_of_fewer_rounds_than_layers(symmetry, edge_types):
    """Their first round already leaves out edges that no output depends on."""
    config = ScaleGMNConfig([2, 5, 4, 3], symmetry=symmetry, num_layers=2, d_hid=6, edge_pos_embed=edge_types)
    model = from_config(config).double().eval()
    expected = outputs_and_gradients(model, WorkPlan.none())
    for actual, wanted in zip(outputs_and_gradients(model, WorkPlan()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)
