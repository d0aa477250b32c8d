"""`GraphBatch.from_modules`: layers and symmetries read off live modules, checked against what the modules compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.graph.builders import _MODULE_KINDS


class Sine(nn.Module):
    def __init__(self, w0=30.0):
        super().__init__()
        self.w0 = w0

    def forward(self, x):
        return torch.sin(self.w0 * x)


class Siren(nn.Module):
    """A linear layer and its activation in one, as the original implementation's INRs have it."""

    def __init__(self, dim_in, dim_out, activation=None):
        super().__init__()
        self.w0 = 30.0
        self.weight = nn.Parameter(torch.randn(dim_out, dim_in))
        self.bias = nn.Parameter(torch.randn(dim_out))
        self.activation = Sine() if activation is None else activation

    def forward(self, x):
        return self.activation(F.linear(x, self.weight, self.bias))


class BareSiren(Siren):
    """Known by ``w0`` alone: neither its class's name nor a child says sine."""

    def __init__(self, dim_in, dim_out):
        super().__init__(dim_in, dim_out)
        del self.activation

    def forward(self, x):
        return torch.sin(self.w0 * F.linear(x, self.weight, self.bias))


class SineLayer(nn.Module):
    """A sine around a linear child, as in the SIREN authors' code."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.omega_0 = 30.0
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


class Inr(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)
        self.seq = nn.Sequential(*layers)

    def forward(self, x):
        return self.seq(x) + 0.5


class Functional(nn.Module):
    """Its activation stands in ``forward``, where it cannot be seen."""

    def __init__(self):
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)
        self.fc1, self.dropout, self.fc2 = nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.conv2(self.pool(F.relu(self.conv1(x))))).mean((2, 3))
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class OwnForward(nn.Sequential):
    def forward(self, x):
        return self[1](F.gelu(self[0](x)))


class Cube(nn.Module):
    def forward(self, x):
        return x**3


def mlp(*between, layout=(2, 4, 3, 1)):
    """Linear layers with ``between`` after each but the last."""
    layers = []
    for n_in, n_out in zip(layout[:-1], layout[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), *between]
    return nn.Sequential(*layers[: len(layers) - len(between)])


def parameters(*modules):
    """What `from_weights` takes, for networks of equal linear layers."""
    layers = [[m for m in module.modules() if getattr(m, "weight", None) is not None] for module in modules]
    weights = [torch.stack([m.weight.T for m in level]) for level in zip(*layers, strict=True)]
    biases = [torch.stack([m.bias for m in level]) for level in zip(*layers, strict=True)]
    return weights, biases


def assert_same_features(a: GraphBatch, b: GraphBatch):
    assert a.layouts == b.layouts
    assert torch.equal(a.node_features, b.node_features)
    assert torch.equal(a.edge_features, b.edge_features)


@pytest.mark.parametrize(
    ("make", "symmetry"),
    [
        (lambda: mlp(nn.Tanh()), "sign"),
        (lambda: mlp(nn.ReLU()), "scale"),
        (lambda: mlp(nn.LeakyReLU(0.2), nn.Dropout(0.5)), "scale"),
        (lambda: mlp(nn.GELU()), "permutation"),
        (lambda: mlp(), "scale"),
        (lambda: mlp(Sine()), "sign"),
        (lambda: mlp(nn.Sequential(nn.Identity(), nn.Sequential(nn.Softsign()))), "sign"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 1))), "scale"),
        (lambda: nn.Sequential(Siren(2, 4), Siren(4, 4), nn.Linear(4, 1)), "sign"),
        (lambda: nn.Sequential(Siren(2, 4, nn.ReLU()), Siren(4, 1, nn.Identity())), "scale"),
        (lambda: nn.Sequential(BareSiren(2, 4), nn.Linear(4, 1)), "sign"),
        (lambda: nn.Sequential(SineLayer(2, 4), SineLayer(4, 3), nn.Linear(3, 1)), "sign"),
        (lambda: Inr(Siren(2, 4), Siren(4, 3), nn.Linear(3, 1)), "sign"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), "hetero"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1)), "permutation"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)), "sign"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid()), "scale"),
        (lambda: nn.Sequential(nn.Softmax(-1), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Softmax(-1)), "scale"),
        (lambda: nn.Sequential(nn.Linear(2, 4)), "scale"),
        (lambda: nn.Linear(2, 4), "scale"),
    ],
)
def test_layers_and_symmetry(make, symmetry):
    modules = [make(), make()]
    batch = GraphBatch.from_modules(modules)
    assert_same_features(batch, GraphBatch.from_weights(*parameters(*modules)))
    assert batch.symmetry == symmetry
    if symmetry in ("sign", "scale"):
        assert batch.sign_mask.tolist() == [symmetry == "sign"] * batch.num_nodes
    elif symmetry == "permutation":
        assert batch.sign_mask is None


def test_sign_mask_per_neuron_of_mixed_activations():
    mixed = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    batch = GraphBatch.from_modules([mixed, mlp(nn.Tanh()), mlp(nn.ReLU())])
    assert batch.symmetry == "hetero"
    found = {
        graph: [
            batch.sign_mask[(batch.plan.node_graph == graph) & (batch.plan.node_layer == layer)].tolist()
            for layer in range(4)
        ]
        for graph in range(3)
    }
    assert found[0] == [[False] * 2, [False] * 4, [True] * 3, [True]]
    assert found[1] == [[True] * 2, [True] * 4, [True] * 3, [True]]
    assert found[2] == [[False] * 2, [False] * 4, [False] * 3, [False]]


def test_networks_of_unlike_symmetry_join():
    tanh, relu, gelu = (GraphBatch.from_modules([mlp(act)]) for act in (nn.Tanh(), nn.ReLU(), nn.GELU()))
    assert GraphBatch.cat([tanh, relu]).symmetry == "hetero"
    joined = GraphBatch.cat([tanh, gelu])
    assert (joined.symmetry, joined.sign_mask) == ("permutation", None)
    assert GraphBatch.from_modules([mlp(nn.Tanh()), mlp(nn.GELU())]).symmetry == "permutation"


ACTIVATIONS = [cls for cls in _MODULE_KINDS if cls is not nn.Flatten and not cls.__name__.endswith("2d")]


@pytest.mark.parametrize(
    "make", [*ACTIVATIONS, lambda: nn.Hardtanh(-0.5, 0.5), nn.Hardtanh, lambda: nn.Hardtanh(0, 2), Sine]
)
def test_symmetry_is_what_the_function_has(make):
    """The network computes the same after flips or scalings exactly where the symmetry says so."""
    torch.manual_seed(0)
    module = mlp(make(), layout=(3, 16, 2)).double().eval()
    kinds = GraphBatch.from_modules([module]).symmetry
    x = 8 * torch.randn(64, 3, dtype=torch.float64)
    flips = 1 - 2 * torch.randint(2, (16,)).double()
    unchanged = {
        name: same_after(module, x, q) for name, q in (("sign", flips), ("scale", torch.rand(16).double() + 0.2))
    }
    linear = isinstance(module[1], (nn.Identity, nn.Dropout))
    assert unchanged == {"sign": kinds == "sign" or linear, "scale": kinds == "scale" or linear}


def same_after(module, x, q):
    changed = copy.deepcopy(module)
    with torch.no_grad():
        first, last = changed[0], changed[-1]
        first.weight.mul_(q.reshape(-1, *[1] * (first.weight.ndim - 1)))
        first.bias.mul_(q)
        last.weight.div_(q.reshape(1, -1, *[1] * (last.weight.ndim - 2)))
    return torch.allclose(module(x), changed(x), rtol=1e-9, atol=1e-9)


POOLS = [
    (nn.Tanh(), nn.MaxPool2d(2), "permutation"),
    (nn.ReLU(), nn.MaxPool2d(2), "scale"),
    (nn.LeakyReLU(), nn.AdaptiveMaxPool2d(3), "scale"),
    (nn.Tanh(), nn.AvgPool2d(2), "sign"),
    (nn.Tanh(), nn.ZeroPad2d(1), "sign"),
    (nn.ReLU(), nn.AdaptiveAvgPool2d(3), "scale"),
    (nn.ReLU(), nn.Dropout2d(0.5), "scale"),
    (nn.AvgPool2d(2), nn.Tanh(), "sign"),
    (nn.MaxPool2d(2), nn.Tanh(), "permutation"),
    (nn.MaxPool2d(2), nn.ReLU(), "scale"),
]


@pytest.mark.parametrize(("first", "second", "symmetry"), POOLS)
def test_pooling_keeps_the_symmetry_or_not(first, second, symmetry):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), first, second, nn.Conv2d(4, 2, (1, 3))).double().eval()
    batch = GraphBatch.from_modules([module])
    assert (batch.symmetry, batch.layouts) == (symmetry, ((1, 4, 2),))
    x = torch.randn(8, 1, 12, 12, dtype=torch.float64)
    flips = 1 - 2 * torch.randint(2, (4,)).double()
    assert same_after(module, x, flips) == (symmetry == "sign")
    assert same_after(module, x, torch.rand(4).double() + 0.2) == (symmetry == "scale")


def cnn(flatten_pixels=1):
    return nn.Sequential(
        nn.Conv2d(1, 4, (3, 5), stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d((flatten_pixels, 1)), nn.Flatten(), nn.Linear(6 * flatten_pixels, 10),
    )  # fmt: skip


@pytest.mark.parametrize("pixels", [1, 3, 20])
@pytest.mark.parametrize("options", [{}, {"linear_tap": "first"}, {"kernel_size": (5, 5)}, {"input_value": 2.0}])
def test_convolutions_are_those_of_the_state_dict(pixels, options):
    modules = [cnn(pixels) for _ in range(2)]
    batch = GraphBatch.from_modules(modules, **options)
    assert_same_features(batch, GraphBatch.from_state_dicts([m.state_dict() for m in modules], **options))
    assert (batch.layouts, batch.symmetry) == (((1, 4, 6, 10),) * 2, "scale")
    size = 25 if "kernel_size" in options else 15
    assert batch.edge_features.shape[1] == max(size, pixels)
    assert not batch.to_weights()[1][1].any()


def test_a_module_that_occurs_twice_runs_twice():
    shared = nn.Tanh()
    module = nn.Sequential(nn.Linear(2, 3), shared, nn.Linear(3, 3), shared, nn.Linear(3, 1))
    batch = GraphBatch.from_modules([module])
    assert (batch.symmetry, batch.layouts) == ("sign", ((2, 3, 3, 1),))
    tied = nn.Linear(3, 3)
    module = nn.Sequential(tied, nn.ReLU(), tied, nn.ReLU(), nn.Linear(3, 1))
    assert GraphBatch.from_modules([module]).layouts == ((3, 3, 3, 1),)


def test_what_forward_applies_must_be_said():
    with pytest.raises(
        ValueError, match=r"activation must say what forward applies between modules\[0\].conv1 and modules\[0\].conv2"
    ):
        GraphBatch.from_modules([Functional()])
    assert GraphBatch.from_modules([Functional()], activation="scale").symmetry == "scale"
    # max pooling stands between the convolutions, so that an odd activation does not help
    assert GraphBatch.from_modules([Functional()], activation="sign").symmetry == "permutation"
    assert GraphBatch.from_modules([Functional()], activation="permutation").symmetry == "permutation"
    assert GraphBatch.from_modules([Functional()], activation="scale").layouts == ((1, 3, 4, 5, 2),)
    with pytest.raises(ValueError, match=r"between modules\[0\].0 and modules\[0\].1"):
        GraphBatch.from_modules([OwnForward(nn.Linear(2, 3), nn.Linear(3, 1))])
    inside = nn.Sequential(nn.ModuleDict({"fc": nn.Linear(2, 3)}), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"between modules\[0\].0.fc and modules\[0\].1"):
        GraphBatch.from_modules([inside])


def test_own_activations_are_named():
    module = mlp(Cube())
    with pytest.raises(
        ValueError, match=r"modules\[0\].1 is a Cube, whose symmetry is unknown; supported are Linear, Conv2d"
    ):
        GraphBatch.from_modules([module])
    assert GraphBatch.from_modules([module], module_symmetry={Cube: "sign"}).symmetry == "sign"
    assert GraphBatch.from_modules([mlp(nn.ReLU())], module_symmetry={nn.ReLU: "permutation"}).symmetry == "permutation"


def test_architectures_may_differ():
    modules = [mlp(nn.ReLU()), cnn(), mlp(nn.ReLU(), layout=(2, 3)), mlp(nn.ReLU())]
    batch = GraphBatch.from_modules(modules)
    assert batch.layouts == ((2, 4, 3, 1), (1, 4, 6, 10), (2, 3), (2, 4, 3, 1))
    for number, module in enumerate(modules):
        alone = GraphBatch.from_modules([module], kernel_size=(3, 5))
        assert torch.equal(batch.node_features[batch.plan.node_graph == number], alone.node_features)


def test_gradients_reach_live_parameters():
    modules = [nn.Sequential(Siren(2, 3), nn.Linear(3, 1)), cnn(2)]
    batch = GraphBatch.from_modules(modules)
    loss = (batch.node_features**2).sum() + (batch.edge_features**2).sum()
    loss.backward()
    for module in modules:
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * parameter, msg=name)


SUPPORTED = "supported are Linear, Conv2d, Tanh"


@pytest.mark.parametrize(
    ("modules", "options", "error", "message"),
    [
        ([], {}, ValueError, "modules must hold at least one network, got an empty list"),
        (mlp(nn.ReLU()), {}, TypeError, "modules must be a list, one entry per network, got Sequential"),
        (
            [mlp(nn.ReLU()), mlp(nn.ReLU()).state_dict()],
            {},
            TypeError,
            r"modules\[1\] must be a torch.nn.Module, got OrderedDict",
        ),
        (
            [nn.Sequential(nn.ReLU())],
            {},
            ValueError,
            r"modules\[0\] must hold at least one Linear or Conv2d, got Sequential",
        ),
        (
            [mlp(nn.BatchNorm1d(4), layout=(2, 4, 4, 1))],
            {},
            ValueError,
            r"modules\[0\].1 is a BatchNorm1d with the parameters",
        ),
        ([mlp(nn.LayerNorm(4), layout=(2, 4, 1))], {}, ValueError, f"is a LayerNorm with the parameters.*{SUPPORTED}"),
        ([mlp(nn.Softmax(-1))], {}, ValueError, r"modules\[0\].1 is a Softmax, whose symmetry is unknown"),
        ([mlp(nn.PReLU(4), layout=(2, 4, 1))], {}, ValueError, "is a PReLU with num_parameters=4: slopes per neuron"),
        ([nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))], {}, ValueError, f"is a Conv2d with groups=2.*{SUPPORTED}"),
        ([nn.Sequential(nn.ConvTranspose2d(1, 4, 3))], {}, ValueError, "is a ConvTranspose2d with the parameters"),
        (
            [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Linear(9, 1))],
            {},
            ValueError,
            "is a Flatten of dimensions 2 to -1",
        ),
        (
            [nn.Sequential(nn.LazyLinear(3))],
            {},
            ValueError,
            "is a LazyLinear that has no parameters before its first call",
        ),
        (
            [nn.MultiheadAttention(4, 1)],
            {},
            ValueError,
            r"modules\[0\] is a MultiheadAttention with the parameters \['in_proj",
        ),
        (
            [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(4, 1))],
            {},
            ValueError,
            r"modules\[0\].2 must read the 3 neurons before it: expected 3 inputs, got shape \[1, 4\]",
        ),
        (
            [mlp(), mlp().double()],
            {},
            TypeError,
            r"modules\[1\].0: weight must be floating point of the first weight's dtype",
        ),
        (
            [mlp(), mlp().to("meta")],
            {},
            ValueError,
            r"modules\[1\].0: weight must be on the first weight's device cpu, got meta",
        ),
        ([mlp()], {"activation": "relu"}, ValueError, "activation must be one of sign, scale, permutation, got 'relu'"),
        (
            [mlp()],
            {"module_symmetry": {Cube: "odd"}},
            ValueError,
            r"module_symmetry\[Cube\] must be one of sign.*got 'odd'",
        ),
    ],
)
def test_bad_input(modules, options, error, message):
    with pytest.raises(error, match=message):
        GraphBatch.from_modules(modules, **options)
