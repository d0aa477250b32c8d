"""`trace`: modules as graphs, the symmetries that are found, and their numeric proof."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalegmn_fast.graph import GraphBatch, SymmetryError, trace
from scalegmn_fast.models import from_config, neural_graphs_config, published_config
from scalegmn_fast.testing import networks, relative_error


def function_module(forward, **children):
    """A module of the given children (or parameters) with a function of (module, x) as its forward."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

        def forward(self, x):
            return forward(self, x)

    return Module()


def mlp(activation, widths=(3, 5, 4, 2)):
    layers = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), activation]
    return nn.Sequential(*layers[:-1])


def squeeze_excitation():
    def forward(m, x):
        x = F.relu(m.conv(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
        return m.out(x * gate[:, :, None, None]).mean((2, 3))

    return function_module(
        forward, conv=nn.Conv2d(3, 8, 3), down=nn.Linear(8, 2), up=nn.Linear(2, 8), out=nn.Conv2d(8, 4, 1)
    )


def gated():
    def forward(m, x):
        gate, value = m.both(x).chunk(2, -1)
        return m.out(F.silu(gate) * value)

    return function_module(forward, both=nn.Linear(5, 12), out=nn.Linear(6, 3))


def convnext_block():
    def forward(m, x):
        x = m.stem(x)
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        return m.head((x + (m.down(F.gelu(m.up(y))) * m.gamma).permute(0, 3, 1, 2)).mean((-2, -1)))

    return function_module(
        forward, stem=nn.Conv2d(3, 8, 2, 2), depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8), norm=nn.LayerNorm(8),
        up=nn.Linear(8, 20), down=nn.Linear(20, 8), gamma=nn.Parameter(torch.ones(8)), head=nn.Linear(8, 3),
    )  # fmt: skip


def shuffled():
    def forward(m, x):
        x = F.relu(m.grouped(x))
        x = x.view(-1, 2, 6, 4, 4).transpose(1, 2).reshape(-1, 12, 4, 4)
        return m.head(m.out(F.leaky_relu(m.norm(m.depthwise(x)))).flatten(1))

    return function_module(
        forward, grouped=nn.Conv2d(4, 12, 1, groups=2), depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        norm=nn.GroupNorm(3, 12), out=nn.Conv2d(12, 8, 1, groups=2), head=nn.Linear(8 * 16, 3),
    )  # fmt: skip


def own_attention():
    """Scores, softmax and sum as matrix products, and a mask."""

    def forward(m, x):
        x = m.embed(x)
        q, k, v = (t.view(-1, 5, 2, 3).transpose(1, 2) for t in (m.q(x), m.k(x), m.v(x)))
        mask = torch.ones(5, 5).triu(1).bool()
        weights = (q @ k.transpose(-2, -1) * 3**-0.5).masked_fill(mask, -1e9).softmax(-1)
        return m.out((weights @ v).transpose(1, 2).flatten(2)).amax(1)

    return function_module(
        forward, embed=nn.Linear(4, 6), q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6), out=nn.Linear(6, 2)
    )


def encoder_layer():
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))


def attention_with_weights():
    return function_module(
        lambda m, x: m.attention(m.embed(x), m.embed(x), m.embed(x))[0].mean(1),
        embed=nn.Linear(3, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )  # fmt: skip


def language():
    return function_module(
        lambda m, x: m.out(m.conv(m.embed(x).transpose(1, 2)).tanh().amax(-1)),
        embed=nn.Embedding(11, 6), conv=nn.Conv1d(6, 8, 3), out=nn.Linear(8, 2),
    )  # fmt: skip


def matrices():
    return function_module(
        lambda m, x: torch.sin(x @ m.first + m.bias) @ m.second,
        first=nn.Parameter(torch.randn(3, 7)),
        bias=nn.Parameter(torch.randn(7)),
        second=nn.Parameter(torch.randn(7, 2)),
    )


def pooled_convolutions():
    return nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(2, 6, 3, stride=2, dilation=2), nn.PReLU(6), nn.MaxPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(6 * 9, 5), nn.Hardtanh(), nn.Linear(5, 2),
    )  # fmt: skip


def spatial_gate():
    """A map that channels are summed to and that multiplies them all; RMS norms, differences, constants, resizing."""

    def forward(m, x):
        x = 0.5 * m.conv(x) - m.other(x)
        x = m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.interpolate(x * torch.sigmoid(x.mean(1, keepdim=True)), scale_factor=2)
        x = torch.cat([x.roll(1, 1), m.third(x).flip(1)], 1)
        return m.head(x.sum((2, 3)))

    return function_module(
        forward, conv=nn.Conv2d(2, 6, 1), other=nn.Conv2d(2, 6, 1), norm=nn.RMSNorm(6),
        third=nn.Conv2d(6, 3, 3, padding=1), head=nn.Linear(9, 2),
    )  # fmt: skip


CASES = {
    "mlp_tanh": (lambda: mlp(nn.Tanh()), (2, 3)),
    "mlp_relu": (lambda: mlp(nn.ReLU()), (2, 3)),
    "mlp_gelu": (lambda: mlp(nn.GELU()), (2, 3)),
    "matrices": (matrices, (2, 3)),
    "pooled_convolutions": (pooled_convolutions, (2, 2, 15, 15)),
    "resnet18": (lambda: networks.resnet18(4, 5), (1, 3, 32, 32)),
    "vgg19": (lambda: networks.vgg19_convolutions((4, 4, 0, 6, 6, 0)), (1, 3, 8, 8)),
    "vit": (lambda: networks.VisionTransformer(8, 2, 2, 4, 8, 3), (2, 3, 8, 8)),
    "mixer": (networks.MlpMixer, (2, 3, 8, 8)),
    "densenet": (networks.DenseNet, (2, 3, 16, 16)),
    "conv1d": (networks.conv1d_network, (2, 2, 16)),
    "convnext": (convnext_block, (2, 3, 8, 8)),
    "squeeze_excitation": (squeeze_excitation, (2, 3, 8, 8)),
    "gated": (gated, (2, 5)),
    "shuffled": (shuffled, (2, 4, 4, 4)),
    "spatial_gate": (spatial_gate, (2, 2, 4, 4)),
    "own_attention": (own_attention, (2, 5, 4)),
    "encoder_layer": (encoder_layer, (2, 5, 3)),
    "attention_with_weights": (attention_with_weights, (2, 5, 3)),
}
_TRACED: dict = {}


def example(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    return make(), torch.randn(shape)


def traced(name):
    """(module, what is understood of it), traced once for all tests."""
    if name not in _TRACED:
        module, x = example(name)
        _TRACED[name] = module, trace(module, x)
    return _TRACED[name]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the group -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_group_that_is_kept_does_not_change_the_module(name):
    module, network = traced(name)
    assert network.verify(module, generator=seeded()) <= 1e-8


@pytest.mark.parametrize("name", CASES)
def test_a_group_element_moves_the_weights(name):
    """Every class that is not fixed moves or scales something, so the proof above proves something."""
    module, network = traced(name)
    element = network.random_element(seeded())
    moved = copy.deepcopy(module)
    network.transform(moved, element)
    changed = {k for (k, a), b in zip(module.state_dict().items(), moved.state_dict().values(), strict=True)
               if not torch.equal(a, b)}  # fmt: skip
    weights = {k for k, v in module.named_parameters() if v.ndim > 1}
    assert weights <= changed
    assert any(not neurons.is_fixed and len(neurons.members) > 1 for neurons in network.classes)


def groups(name):
    """(number of neurons, symmetries of the wires of a class) of all classes that are not fixed."""
    return sorted((len(c.members), c.symmetry) for c in traced(name)[1].classes if not c.is_fixed)


LINEAR = "sign and scale"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mlp_tanh", [(4, ("sign",)), (5, ("sign",))]),
        ("mlp_relu", [(4, ("scale",)), (5, ("scale",))]),
        ("mlp_gelu", [(4, ("permutation",)), (5, ("permutation",))]),
        ("matrices", [(7, ("sign",))]),
        ("pooled_convolutions", [(5, ("sign",)), (6, ("scale",))]),
        # a gate takes the scale of what it multiplies; the hidden units before it keep theirs
        ("squeeze_excitation", [(2, ("scale",)), (8, ("permutation",) * 3)]),
        ("gated", [(6, ("permutation",) * 3)]),
        # the stream of a residual sum is linear: stem, gamma * down and their sum share a scale, the norm has its own
        ("convnext", [(8, (LINEAR, "permutation", LINEAR, LINEAR, LINEAR)), (20, ("permutation",))]),
        # a depthwise convolution moves with its input and has scales of its own
        ("conv1d", [(8, (LINEAR, "sign", "sign", "sign"))]),
        ("vgg19", [(4, ("scale",)), (4, ("scale",)), (6, ("scale",))]),
    ],
)
def test_classes_of_neurons(name, expected):
    assert groups(name) == sorted(expected)


def test_residual_branches_share_neurons():
    _, network = traced("resnet18")
    streams = [c for c in network.classes if any(place.endswith("bn2") for place in c.places)]
    assert [len(c.members) for c in streams] == [4, 8, 16, 32]
    for stream in streams[1:]:
        assert {"bn2", "1"} <= {place.rpartition(".")[2] for place in stream.places}  # 1: the norm of the downsampling
        assert {
            s for p, s in zip(stream.places, stream.symmetry, strict=True) if p.endswith(("bn2", "downsample.1"))
        } == {"scale"}


def test_attention_keeps_heads_apart_and_queries_with_keys():
    """Per head queries move with keys and scale against them; values move and scale with what is read of them."""
    _, network = traced("own_attention")
    found = sorted(c.places for c in network.classes if len(c.members) == 3)
    assert [places for places in found if places[:2] == ("q", "k")] == [("q", "k")] * 2
    assert [places[0] for places in found if places[0] == "v"] == ["v"] * 2
    element = network.random_element(seeded())
    pairs = next(c.members for c in network.classes if c.places == ("q", "k"))
    q, k = element.scale[pairs[:, 0]], element.scale[pairs[:, 1]]
    assert torch.allclose(q * k, torch.ones_like(q)) and not torch.allclose(q.abs(), torch.ones_like(q))


def test_layer_norm_takes_the_scale_of_what_it_reads():
    _, network = traced("vit")
    stream = next(c for c in network.classes if "patches" in c.places)
    kinds = dict(zip(stream.places, stream.symmetry, strict=True))
    assert kinds["patches"] == kinds["cls_token"] == kinds["blocks.0.proj"] == "permutation"
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    (neurons,) = (c for c in trace(module, torch.randn(2, 3)).classes if not c.is_fixed)
    assert neurons.symmetry == ("permutation", "scale")  # its output scales with its own weight


def test_tokens_of_a_mixer_stay_in_place():
    _, network = traced("mixer")
    fixed = [place for c in network.classes if c.is_fixed for place in c.places]
    assert "blocks.0.tokens.2" in fixed and "blocks.0.tokens.0" not in fixed
    assert (10, ("permutation",)) in groups("mixer")


# -- wrong claims fail -----------------------------------------------------------------------------------------------


def with_symmetry(network, place, symmetry):
    """A copy that claims a symmetry of the class that a layer's neurons are in."""
    classes = [
        c._replace(symmetry=tuple(symmetry if p == place else s for p, s in zip(c.places, c.symmetry, strict=True)))
        for c in network.classes
    ]
    return replace(network, classes=classes)


@pytest.mark.parametrize(
    "name, place, symmetry",
    [("mlp_gelu", "0", "sign"), ("mlp_gelu", "2", "scale"), ("mlp_relu", "2", "sign"), ("mlp_tanh", "0", "scale"),
     ("vit", "patches", "scale"), ("squeeze_excitation", "conv", "scale")],
)  # fmt: skip
def test_a_wrong_scaling_fails_the_check(name, place, symmetry):
    module, network = traced(name)
    with pytest.raises(SymmetryError, match=rf"relative error .* {re.escape(place)} \({symmetry}\)"):
        with_symmetry(network, place, symmetry).verify(module, generator=seeded())


def test_a_scaling_of_one_residual_branch_alone_fails_the_check():
    module, network = traced("resnet18")
    untied = replace(network, scale_sets=(torch.arange(len(network.node_of)).numpy(), network.scale_sets[1]))
    with pytest.raises(SymmetryError):
        untied.verify(module, generator=seeded())


@pytest.mark.parametrize("name, place", [("own_attention", "q"), ("shuffled", "out"), ("densenet", "first.0.conv")])
def test_a_permutation_across_heads_or_groups_fails_the_check(name, place):
    """Classes that look alike and are told apart by what reads them, taken for one."""
    module, network = traced(name)
    chosen = next(c for c in network.classes if c.places[0] == place)
    alike = [c for c in network.classes if c.symmetry == chosen.symmetry or c.places[0] == "first.1.conv"]
    width = min(c.members.shape[1] for c in alike)
    members = torch.cat([torch.from_numpy(c.members[:, -width:]) for c in alike]).numpy()
    joined = chosen._replace(members=members, symmetry=chosen.symmetry[-width:], places=chosen.places[-width:])
    others = [c for c in network.classes if all(c is not other for other in alike)]
    with pytest.raises(SymmetryError, match=f"x {re.escape(joined.places[0])}"):
        replace(network, classes=[joined, *others]).verify(module, generator=seeded())


def test_verify_leaves_the_module_alone():
    module, x = example("resnet18")
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    trace(module, x).verify(module)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert modes == [m.training for m in module.modules()]


# -- the graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.GELU()])
def test_a_stack_of_layers_is_the_graph_of_from_modules(activation):
    modules = [nn.Sequential(nn.Conv2d(2, 3, 3), activation, nn.Flatten(), nn.Linear(12, 4)), mlp(activation)]
    for module, x in zip(modules, (torch.randn(1, 2, 4, 4), torch.randn(1, 3)), strict=True):
        ours, known = trace(module, x).batch([module]), GraphBatch.from_modules([module])
        assert torch.equal(ours.node_features, known.node_features)
        assert torch.equal(ours.edge_features, known.edge_features)
        assert ours.layouts == known.layouts and ours.symmetry == known.symmetry
        assert (ours.sign_mask is None) == (known.sign_mask is None)
        assert [a.convolutions for a in ours.architectures] == [a.convolutions for a in known.architectures]


def evaluated(network, module, x):
    """The network's outputs, computed from its graph: every edge has one number, pixels have none."""
    batch = network.batch([module])
    plan, values = batch.plan, batch.node_features[:, 0].clone()
    first = plan.num_nodes - plan.num_first
    values[first:] = x
    named = {network._graph.node[network.node_of[wire]]: name for wire, name in network.activations.items()}
    names = [named.get(int(node)) for node in network._graph.node_order]
    weights = batch.edge_features[:, 0]
    for node in sorted(range(first), key=lambda k: int(plan.node_layer[k])):
        edges = slice(int(plan.target_ptr[node]), int(plan.target_ptr[node + 1]))
        total = values[node] + (weights[edges] * values[plan.source[edges].long()]).sum()
        values[node] = getattr(F, names[node])(total) if names[node] else total
    return values[: plan.num_last]


def test_the_graph_computes_the_network():
    """Sums, concatenation, folded and unfolded norms, a scale per channel, reordered and repeated neurons."""

    def forward(m, x):
        h = torch.relu(m.norm(m.first(x)))
        h = torch.relu(m.second(h) + m.skip(h))  # both branches from the same neurons
        h = torch.relu(h + m.gamma * m.third(h))
        h = torch.cat([h.flip(1), torch.relu(m.fourth(x))], 1)
        return m.head(m.after(h))

    module = function_module(
        forward, first=nn.Linear(3, 5), norm=nn.BatchNorm1d(5), second=nn.Linear(5, 5), skip=nn.Linear(5, 5),
        third=nn.Linear(5, 5), gamma=nn.Parameter(torch.randn(5)), fourth=nn.Linear(3, 2), after=nn.BatchNorm1d(7),
        head=nn.Linear(7, 4),
    ).double().eval()  # fmt: skip
    for norm in (module.norm, module.after):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(1, 3, dtype=torch.float64)
    for fold in (True, False):
        network = trace(module, x, fold_batch_norm=fold)
        assert network.verify(module, generator=seeded()) < 1e-10
        assert torch.allclose(evaluated(network, module, x[0]), module(x)[0], atol=1e-12)
        assert len(network.layout) == (8 if fold else 9)


def test_large_kernels_and_feature_maps_are_spread_over_repeated_nodes():
    module = nn.Sequential(nn.Conv2d(2, 3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    whole, spread = trace(module, x), trace(module, x, kernel_size=(3, 3))
    assert whole.batch([module]).edge_features.shape[1] == 25
    batch = spread.batch([module])
    assert batch.edge_features.shape == (2 * 3 * 3 + 2 * 3 + 3 * 4 * 2 + 3 * 2, 9)
    copies = 2 * 3 + 3 * 2
    total = sum(layer.weight.square().sum() for layer in (module[0], module[3]))
    assert torch.allclose(batch.edge_features.square().sum() - copies, total)
    assert batch.symmetry == "scale" and spread.layout == (2, 6, 3, 6, 4)


def test_kernels_of_two_shapes_are_centred():
    module = nn.Sequential(
        nn.Conv2d(1, 1, (1, 3), bias=False), nn.ReLU(), nn.Conv2d(1, 1, 3, bias=False), nn.Flatten(2)
    )
    edges = trace(module, torch.randn(1, 1, 9, 9)).batch([module]).edge_features.view(2, 3, 3)
    assert torch.equal(edges[0], module[2].weight[0, 0])
    assert torch.equal(edges[1, 1], module[0].weight[0, 0, 0]) and not edges[1, [0, 2]].any()


def test_one_trace_serves_modules_and_state_dicts_of_the_architecture():
    module, network = traced("resnet18")
    other = networks.resnet18(4, 5)
    batch = network.batch([module, other.state_dict()])
    alone = [network.batch([m]) for m in (module, other)]
    assert batch.num_graphs == 2 and batch.symmetry == "scale" and bool((~batch.sign_mask).all())
    together = GraphBatch.cat(alone)
    assert torch.equal(batch.edge_features, together.edge_features)
    assert torch.equal(batch.node_features, together.node_features)
    batch.edge_features.square().sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if n.endswith("weight"))


def test_gradients_reach_every_parameter():
    module, network = traced("vit")
    batch = network.batch([module])
    (batch.edge_features.square().sum() + batch.node_features.square().sum()).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_sign_and_scale_neurons_make_a_hetero_batch():
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    batch = trace(module, torch.randn(1, 2)).batch([module])
    known = GraphBatch.from_modules([module])
    assert batch.symmetry == known.symmetry == "hetero"
    hidden = slice(batch.plan.num_last, -batch.plan.num_first)
    assert torch.equal(batch.sign_mask[hidden], known.sign_mask[hidden])


def element_of_the_graph(network, module):
    """A group element with the scalings alone that the graph's symmetry has for all neurons."""
    element = network.random_element(seeded())
    kinds = {"sign": torch.sign, "scale": torch.abs, "permutation": torch.ones_like, "hetero": torch.clone}
    return replace(element, scale=kinds[network.batch([module]).symmetry](element.scale))


@pytest.mark.parametrize("name", CASES)
def test_the_graph_of_a_moved_network_is_the_moved_graph(name):
    """Bias i becomes q_i b_p(i), edge j -> i becomes q_i / q_j times the edge p(j) -> p(i)."""
    module, x = example(name)
    module = module.double()
    network = trace(module, x.double())
    element = element_of_the_graph(network, module)
    moved = copy.deepcopy(module)
    network.transform(moved, element)
    before, after = network.batch([module]), network.batch([moved])
    graph = network._graph
    place = torch.empty_like(graph.node_order)
    place[graph.node_order] = torch.arange(graph.num_nodes)  # in the plan, of each node
    used = torch.from_numpy(graph.node[network.node_of])
    old, scale = torch.arange(graph.num_nodes), torch.ones(graph.num_nodes, dtype=torch.float64)
    for wire in (used >= 0).nonzero().flatten():  # of the wires that share a node the last one is what is sent
        old[place[used[wire]]] = place[used[element.moved[wire]]]
        scale[place[used[wire]]] = element.scale[wire]
    assert torch.allclose(after.node_features[:, 0], scale * before.node_features[old, 0])
    source, target = before.plan.index("source"), before.plan.index("target")
    key = target * graph.num_nodes + source
    edge = torch.searchsorted(key, old[target] * graph.num_nodes + old[source])
    assert torch.equal(key[edge], old[target] * graph.num_nodes + old[source])
    expected = (scale[target] / scale[source]).unsqueeze(1) * before.edge_features[edge]
    assert torch.allclose(after.edge_features, expected)
    assert torch.equal(before.plan.node_layer[old], before.plan.node_layer)


# -- models over it --------------------------------------------------------------------------------------------------


def scalegmn(network, kernel, name="svhn/scalegmn_relu", symmetry=None):
    """A narrow ScaleGMN of four rounds that reads the whole graph."""
    config = published_config(name)
    config["data"]["layer_layout"] = list(network.layout)
    args = config["scalegmn_args"]
    args |= {"d_hid": 8, "canonical_eps": 0.0, "_max_kernel_height": kernel[0], "_max_kernel_width": kernel[1]}
    args["symmetry"] = symmetry or args["symmetry"]
    args["mlp_args"]["d_k"] = [8]
    return from_config(config).double().eval()


@pytest.mark.filterwarnings("ignore:d_hid")
@pytest.mark.parametrize(
    "name, symmetry", [("resnet18", "scale"), ("densenet", "scale"), ("vit", "permutation"), ("mixer", "permutation")]
)
def test_scalegmn_is_invariant_to_the_group(name, symmetry):
    module, x = example(name)
    module = module.double()
    network = trace(module, x.double(), kernel_size=(3, 3))
    moved = copy.deepcopy(module)
    network.transform(moved, element_of_the_graph(network, module))
    model = scalegmn(network, (3, 3), symmetry=symmetry)
    out, same, other = (model(network.batch([m])) for m in (module, moved, example_like(module)))
    assert relative_error(same, out) < 1e-9
    assert relative_error(other, out) > 1e-6
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ["resnet18", "mixer"])
def test_neural_graphs_of_varying_architectures_are_invariant_to_permutations(name):
    module, x = example(name)
    module = module.double().eval()
    network = trace(module, x.double(), kernel_size=(3, 3))
    moved, layout = copy.deepcopy(module), network.layout
    element = network.random_element(seeded())
    network.transform(moved, replace(element, scale=torch.ones_like(element.scale)))
    config = neural_graphs_config("cnn_generalization/pna")
    config |= {"input_channels": layout[0], "num_classes": layout[-1]}
    config["graph_constructor"] |= {"d_edge_in": 9, "max_num_hidden_layers": len(layout), "stats": None}
    model = from_config(config).double().eval()
    out, same, other = (model(network.batch([m])) for m in (module, moved, example_like(module)))
    assert relative_error(same, out) < 1e-9 < relative_error(other, out)


def example_like(module):
    """The module with other weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=seeded(1)))
    return other


# -- what is not understood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, x, message",
    [
        (function_module(lambda m, x: torch.cumsum(m.a(x), 1), a=nn.Linear(3, 4)), torch.randn(2, 3),
         "cumsum in forward is not supported; supported are .*conv2d.*linear"),
        (function_module(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(3, 3)), torch.randn(2, 3),
         "module must run on inputs and be feed-forward, without control flow"),
        (function_module(lambda m, x: m.a(torch.relu(m.a(x))), a=nn.Linear(3, 3)), torch.randn(2, 3),
         "linear in a reads a.weight a second time, after a: weights must be used once"),
        (function_module(lambda m, x: F.linear(x, m.a.weight * 2), a=nn.Linear(3, 3)), torch.randn(2, 3),
         "mul in forward"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), torch.randn(2, 1, 4, 4),
         "batch_norm in 1 has no running statistics"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_with_its_place(module, x, message):
    with pytest.raises(ValueError, match=message):
        trace(module, x)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        (("net", torch.zeros(1, 2)), {}, TypeError, "module must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 2),), {}, ValueError, "inputs must hold an example"),
        ((nn.Linear(2, 2), [1.0]), {}, TypeError, r"inputs\[0\] must be a torch.Tensor, got list"),
        ((nn.Linear(2, 2), torch.zeros(1, 2)), {"kernel_size": (3,)}, ValueError, "kernel_size must be two positive"),
        ((nn.Linear(2, 2), torch.zeros(1, 2)), {"unknown": "skip"}, ValueError, "unknown must be error or fix"),
    ],
)
def test_arguments_of_trace(args, options, error, message):
    with pytest.raises(error, match=message):
        trace(*args, **options)


def test_arguments_of_batch():
    module, network = traced("mlp_relu")
    with pytest.raises(ValueError, match="networks must hold at least one network"):
        network.batch([])
    with pytest.raises(TypeError, match=r"networks\[0\] must be a torch.nn.Module or a state dict, got int"):
        network.batch([3])
    with pytest.raises(KeyError, match=r"networks\[1\] must hold '0.bias'"):
        network.batch([module, {"0.weight": module[0].weight}])
    with pytest.raises(ValueError, match=r"networks\[0\]\['0.bias'\] must have shape \[5\], got \[6\]"):
        network.batch([mlp(nn.ReLU(), (3, 6, 4, 2))])


def test_an_unknown_operation_can_fix_what_it_reads():
    module = function_module(
        lambda m, x: m.c(F.relu(m.b(torch.cumsum(F.relu(m.a(x)), 1)))),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 2),
    )
    network = trace(module, torch.randn(2, 3), unknown="fix")
    assert network.verify(module, generator=seeded()) < 1e-10
    assert [(len(c.members), c.symmetry) for c in network.classes if not c.is_fixed] == [(5, ("scale",))]
    assert "forward: cumsum is not understood" in network.report()
    assert network.batch([module]).symmetry == "permutation"


def test_constants_beside_neurons_and_differences():
    """Zeros in front of tokens fix the neurons of these; a constant vector fixes the neurons it is added to."""

    def forward(m, x):
        x = torch.cat([torch.zeros(x.shape[0], 1, 4), m.a(x)], 1)
        return m.c(torch.relu(m.b(x) + torch.arange(5.0)) - torch.relu(m.d(x)))

    module = function_module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2), d=nn.Linear(4, 5))
    network = trace(module, torch.randn(2, 6, 3))
    assert network.verify(module, generator=seeded()) < 1e-10
    assert all(neurons.is_fixed for neurons in network.classes)


def test_what_is_written_in_place_is_not_read_under_another_name():
    def forward(m, x):
        x = m.a(x)
        view = x.view(2, 2, 2)
        x.relu_()
        return m.b(view.flatten(1))

    module = function_module(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="relu_ in forward writes into a tensor that is read under another name"):
        trace(module, torch.randn(2, 3))


def test_from_modules_traces_where_inputs_are_given():
    module = networks.resnet18(4, 5)
    x = torch.randn(1, 3, 32, 32)
    batch, known = GraphBatch.from_modules([module, module], inputs=x), trace(module, x).batch([module, module])
    assert torch.equal(batch.edge_features, known.edge_features) and batch.symmetry == "scale"
    with pytest.raises(ValueError, match="activation must be left out with inputs"):
        GraphBatch.from_modules([module], inputs=x, activation="scale")


def test_a_module_called_twice_on_one_value_is_one_operation():
    module = function_module(
        lambda m, x: m.b(torch.tanh(m.a(x)) + torch.relu(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    network = trace(module, torch.randn(2, 3))
    assert network.verify(module, generator=seeded()) < 1e-10
    assert [(len(c.members), c.symmetry) for c in network.classes if not c.is_fixed] == [(4, ("permutation",))]


def test_the_report_says_what_was_kept_and_what_was_not():
    _, network = traced("pooled_convolutions")
    text = network.report()
    assert "6 x 1 (scale)" in text and "5 x 6 (sign)" in text
    assert "2.weight, slopes of a PReLU, are not in the graph" in text
    assert "everything is in graph and group" in traced("mlp_relu")[1].report()


def test_indices_as_input():
    module = language()
    network = trace(module, torch.randint(11, (2, 9)))
    assert network.verify(module, generator=seeded()) < 1e-10
    assert network.layout == (11, 6, 8, 2)


# -- the documentation -----------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs(capsys):
    page = Path(__file__).resolve().parents[2] / "docs" / "tracing.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.S).group(1)
    exec(compile(code, str(page), "exec"), {})
    assert "symmetry scale" in capsys.readouterr().out
