"""`pna_message`, `edge_mlp` and `relational_attention` against the formulas written out edge by edge."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.graph.pairs import message_edges, node_pairs
from scalegmn_fast.reference import edge_mlp, pna_message, relational_attention
from scalegmn_fast.reference.activations import activation_name
from scalegmn_fast.reference.segment_reduce import REDUCTIONS
from scalegmn_fast.testing import random_network, relative_error

# Sums of a few dozen float64 numbers in another order.
TOLERANCE = 1e-12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def linear(d_out, d_in, seed):
    return normal(d_out, d_in, seed=seed), normal(d_out, seed=seed + 100)


def graph_of(*layouts):
    return GraphBatch.cat([GraphBatch.from_weights(*random_network(layout, 2)) for layout in layouts])


def aggregated(rows, name):
    if not len(rows):
        return torch.zeros(rows.shape[1], dtype=rows.dtype)
    var = rows.var(0, correction=0)
    return {
        "sum": lambda: rows.sum(0),
        "mean": lambda: rows.mean(0),
        "min": lambda: rows.amin(0),
        "max": lambda: rows.amax(0),
        "var": lambda: var,
        "std": lambda: torch.where(var > 1e-5, var.sqrt(), 0.0),
    }[name]()


def scaled(value, name, degree, log, lin):
    at_least_one = max(degree, 1)
    return (
        value
        * {
            "identity": 1.0,
            "amplification": math.log(degree + 1) / log,
            "attenuation": log / math.log(at_least_one + 1),
            "linear": degree / lin,
            "inverse_linear": lin / at_least_one,
        }[name]
    )


PNA_CASES = [
    {"modulation": modulation, "towers": towers, "pre_layers": layers, "divide_input": divide}
    for modulation in ("affine", "gate", "concat")
    for towers, layers, divide in ((1, 1, False), (2, 1, False), (2, 3, True), (3, 2, False))
]


def pna_case(modulation, towers, pre_layers, divide_input, *, layouts=((2, 4, 3),), both_ways=False):
    width, d_e = 3, 5
    edges = message_edges(graph_of(*layouts).plan, both_ways)
    read = (3 if modulation == "concat" else 2) * width
    pre = [
        [linear(width, read if layer == 0 else width, 10 * tower + layer) for layer in range(pre_layers)]
        for tower in range(towers)
    ]
    args = {
        "pre": pre,
        "encoder": linear(width if modulation == "concat" else 2 * width, d_e, 77),
        "modulation": modulation,
        "aggregators": REDUCTIONS,
        "scalers": ("identity", "amplification", "attenuation", "linear", "inverse_linear"),
        "avg_deg_log": torch.tensor([1.3], dtype=torch.float64),
        "avg_deg_lin": torch.tensor([2.5], dtype=torch.float64),
        "act": "relu",
        "divide_input": divide_input,
    }
    nodes = edges.ptr.shape[0] - 1
    x = normal(nodes, width * (towers if divide_input else 1), seed=5)
    return x, normal(edges.source.shape[0], d_e, seed=6), edges, args


def naive_pna(x, e, edges, args):
    width = args["pre"][0][0][0].shape[0]
    out = []
    for i in range(edges.ptr.shape[0] - 1):
        ids = range(int(edges.ptr[i]), int(edges.ptr[i + 1]))
        towers = []
        for tower, layers in enumerate(args["pre"]):
            share = x[:, tower * width : (tower + 1) * width] if args["divide_input"] else x
            messages = []
            for k in ids:
                encoded = F.linear(e[k], *args["encoder"])
                h = torch.cat([share[i], share[edges.source[k]]])
                h = torch.cat([h, encoded]) if args["modulation"] == "concat" else h
                for depth, (weight, bias) in enumerate(layers):
                    h = F.linear(torch.relu(h) if depth else h, weight, bias)
                if args["modulation"] == "affine":
                    h = encoded[:width] * h + encoded[width:]
                elif args["modulation"] == "gate":
                    h = torch.sigmoid(encoded[:width]) * h
                messages.append(h)
            rows = torch.stack(messages) if messages else x.new_zeros(0, width)
            parts = torch.cat([aggregated(rows, name) for name in args["aggregators"]])
            log, lin = float(args["avg_deg_log"]), float(args["avg_deg_lin"])
            towers.append(torch.cat([scaled(parts, name, len(ids), log, lin) for name in args["scalers"]]))
        out.append(torch.stack(towers))
    return torch.stack(out)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("case", PNA_CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_pna_message_is_the_formula(case, both_ways):
    x, e, edges, args = pna_case(**case, layouts=((2, 4, 3), (2, 2, 5, 3)), both_ways=both_ways)
    out = pna_message(x, e, edges.source, edges.target, edges.ptr, **args)
    assert relative_error(out, naive_pna(x, e, edges, args)) <= TOLERANCE


def test_pna_message_of_the_first_rows():
    x, e, edges, args = pna_case("affine", 2, 1, False)
    rows, count = 5, int(edges.ptr[5])
    whole = pna_message(x, e, edges.source, edges.target, edges.ptr, **args)
    part = pna_message(x, e[:count], edges.source[:count], edges.target[:count], edges.ptr[: rows + 1], **args)
    assert torch.equal(part, whole[:rows])


def test_pna_message_gradients():
    x, e, edges, args = pna_case("affine", 1, 2, False, layouts=((2, 2, 1),))
    args["aggregators"] = ("mean", "std", "max")

    def function(x, e, weight, encoder):
        changed = {**args, "pre": [[(weight, args["pre"][0][0][1]), *args["pre"][0][1:]]]}
        return pna_message(
            x, e, edges.source, edges.target, edges.ptr, **{**changed, "encoder": (encoder, args["encoder"][1])}
        )

    inputs = [t.requires_grad_() for t in (x, e, args["pre"][0][0][0], args["encoder"][0])]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def attention_case(*layouts, token=False, modulates=True, heads=2, width=6, d_e=3):
    pairs = node_pairs(graph_of(*layouts).plan, token)
    nodes, count = pairs.order.shape[0], pairs.row.shape[0]
    q, k, v = (normal(nodes, width, seed=seed) for seed in range(3))
    return pairs, q, k, v, normal(count, d_e, seed=4), normal((3 + modulates) * width, d_e, seed=5), heads


def naive_attention(pairs, q, k, v, e, w_edge, heads, scale):
    width, factors = q.shape[1], w_edge.shape[0] // q.shape[1]
    head = width // heads
    edge = F.linear(e, w_edge).reshape(-1, heads, factors, head)
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        ids = range(int(pairs.ptr[i]), int(pairs.ptr[i + 1]))
        for h in range(heads):
            part = slice(h * head, (h + 1) * head)
            logits, values = [], []
            for p in ids:
                j, (q_e, k_e, v_e) = pairs.column[p], edge[p, h, :3]
                logits.append(scale * (q[i, part] + q_e) @ (k[j, part] + k_e))
                values.append(v[j, part] * edge[p, h, 3] + v_e if factors == 4 else v[j, part] + v_e)
            out[i, part] = torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("modulates", [True, False])
@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("layouts", [((2, 3, 1),), ((2, 3, 1), (2, 2, 2, 1))], ids=["equal", "mixed"])
def test_relational_attention_is_the_formula(layouts, token, modulates):
    pairs, *tensors, heads = attention_case(*layouts, token=token, modulates=modulates)
    expected = naive_attention(pairs, *tensors, heads, 0.4)
    by_index = relational_attention(*tensors, heads=heads, scale=0.4, row=pairs.row, column=pairs.column)
    assert relative_error(by_index, expected) <= TOLERANCE
    if pairs.size is not None:
        by_views = relational_attention(*tensors, heads=heads, scale=0.4, shape=(pairs.size, pairs.size))
        assert relative_error(by_views, expected) <= TOLERANCE


@pytest.mark.parametrize("views", [True, False])
def test_relational_attention_gradients(views):
    pairs, *tensors, heads = attention_case((1, 2, 1), width=4, d_e=2)
    where = {"shape": (4, 4)} if views else {"row": pairs.row, "column": pairs.column}
    inputs = [t.requires_grad_() for t in tensors]

    def function(*tensors):
        return relational_attention(*tensors, heads=heads, scale=0.5, **where)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_relational_attention_of_large_logits():
    pairs, q, *rest, heads = attention_case((2, 3, 1), (2, 2, 2, 1))
    out = relational_attention(1e3 * q, *rest, heads=heads, scale=10.0, row=pairs.row, column=pairs.column)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_edge_mlp_is_the_formula(act, both_ways):
    pairs = node_pairs(graph_of((2, 3, 1)).plan)
    nodes, count, d, d_e, hidden = pairs.order.shape[0], pairs.row.shape[0], 4, 3, 5
    x, e = normal(nodes, d), normal(count, d_e, seed=1)
    maps = {
        "edge": linear(hidden, (1 + both_ways) * d_e, 2),
        "from_source": linear(hidden, d, 3),
        "from_target": linear(hidden, d, 4),
        "out": linear(2, hidden, 5),
    }
    read = torch.cat([e, e[pairs.reverse]], 1) if both_ways else e
    first = F.linear(read, *maps["edge"])
    first = first + F.linear(x[pairs.row], *maps["from_source"]) + F.linear(x[pairs.column], *maps["from_target"])
    expected = F.linear(getattr(F, act)(first), *maps["out"])
    args = {**maps, "act": act, "both_ways": both_ways}
    by_index = edge_mlp(x, e, pairs.row, pairs.column, **args, reverse=pairs.reverse)
    by_views = edge_mlp(x, e, None, None, **args, size=pairs.size)
    assert relative_error(by_index, expected) <= TOLERANCE
    assert relative_error(by_views, expected) <= TOLERANCE
    inputs = [x.requires_grad_(), e.requires_grad_()]

    def function(x, e):
        return edge_mlp(x, e, None, None, **args, size=pairs.size)

    assert torch.autograd.gradcheck(function, inputs)


def test_no_edges():
    """Rows without edges aggregate to 0, also where there is no edge at all."""
    x, e, edges, args = pna_case("affine", 1, 1, False)
    none = torch.zeros(4, dtype=torch.int32)
    out = pna_message(x, e[:0], edges.source[:0], edges.target[:0], none, **args)
    assert out.shape == (3, 1, 30 * 3) and not out.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modulation": "add"}, "modulation: expected affine, gate, concat, got 'add'"),
        ({"aggregators": ("median",)}, "aggregators: expected sum, .* got 'median'"),
        ({"scalers": ("cubic",)}, "scalers: expected identity, .* got 'cubic'"),
        ({"pre": []}, "pre: expected the layers of at least one tower, got none"),
        ({"act": "swoosh", "pre_layers": 2}, "act: expected one of .* got 'swoosh'"),
    ],
)
def test_bad_arguments_of_pna_message(change, message):
    x, e, edges, args = pna_case("affine", 1, change.pop("pre_layers", 1), False)
    with pytest.raises(ValueError, match=message):
        pna_message(x, e, edges.source, edges.target, edges.ptr, **{**args, **change})


def test_bad_shapes():
    x, e, edges, args = pna_case("affine", 1, 1, False)
    with pytest.raises(ValueError, match="x: expected 3 features, got 2"):
        pna_message(x[:, :2], e, edges.source, edges.target, edges.ptr, **args)
    pairs, q, k, v, e, w_edge, heads = attention_case((2, 3, 1))
    shape = (pairs.size, pairs.size)
    for changed, message in (
        ((q[:, :5], k, v, e, w_edge), "q: expected .* divisible by 2 heads"),
        ((q, k[:, :4], v, e, w_edge), r"k: expected \[N, 6\]"),
        ((q, k, v[:, :4], e, w_edge), r"v: expected \[N, 6\]"),
        ((q, k, v, e[:, :2], w_edge), r"e: expected \[P, 3\]"),
        ((q, k, v, e[1:], w_edge), "e: expected 6 x 6 pairs per graph"),
        ((q, k, v, e, w_edge[1:]), r"w_edge: expected \[18 or 24, d_e\]"),
    ):
        with pytest.raises(ValueError, match=message):
            relational_attention(*changed, heads=heads, scale=1.0, shape=shape)
    with pytest.raises(ValueError, match="row and column: expected indices"):
        relational_attention(q, k, v, e, w_edge, heads=heads, scale=1.0)
    maps = {name: linear(2, 6, 0) for name in ("edge", "from_source", "from_target", "out")}
    with pytest.raises(ValueError, match="source, target and reverse: expected indices"):
        edge_mlp(q, q, None, None, **maps, act="relu")
    with pytest.raises(ValueError, match="e: expected all pairs of graphs of 6 nodes"):
        edge_mlp(q, q, None, None, **maps, act="relu", size=6)


def test_names_of_activations():
    assert [activation_name(name) for name in ("SiLU", "swish", "Leaky-ReLU", "none")] == [
        "silu",
        "silu",
        "leaky_relu",
        "identity",
    ]
    with pytest.raises(ValueError, match="act: expected one of .* got 3"):
        activation_name(3)
