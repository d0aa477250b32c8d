"""`GraphBatch.from_state_dicts`: names, order, kernels, mixed architectures, and bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scalegmn_fast.graph import GraphBatch


def state(layout=(2, 4, 3, 1), seed=0, pattern="seq.{}.weight", **options):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for layer, (n_in, n_out) in enumerate(zip(layout[:-1], layout[1:], strict=True)):
        name = pattern.format(layer)
        out[name] = torch.randn(n_out, n_in, generator=generator, **options)
        out[name.replace("weight", "bias")] = torch.randn(n_out, generator=generator, **options)
    return out


def tensors(states):
    """What `from_weights` takes, by hand."""
    weights = [[v for v in s.values() if v.ndim == 2] for s in states]
    biases = [[v for v in s.values() if v.ndim == 1] for s in states]
    return [torch.stack(w).transpose(1, 2) for w in zip(*weights, strict=True)], [
        torch.stack(b) for b in zip(*biases, strict=True)
    ]


def assert_same_features(a: GraphBatch, b: GraphBatch):
    assert a.layouts == b.layouts
    assert torch.equal(a.node_features, b.node_features)
    assert torch.equal(a.edge_features, b.edge_features)
    assert torch.equal(a.plan.source, b.plan.source)
    assert (a.sign_mask is None) == (b.sign_mask is None)
    assert a.sign_mask is None or torch.equal(a.sign_mask, b.sign_mask)


def test_linear_networks_are_from_weights():
    states = [state(seed=k) for k in range(3)]
    expected = GraphBatch.from_weights(*tensors(states))
    assert_same_features(GraphBatch.from_state_dicts(states), expected)
    assert_same_features(
        GraphBatch.from_state_dicts(states, input_value=0.5), GraphBatch.from_weights(*tensors(states), input_value=0.5)
    )
    mask = torch.tensor([True, False, True])
    for given in (mask, mask.tolist(), list(mask)):
        found = GraphBatch.from_state_dicts(states, sign_mask=given)
        assert_same_features(found, GraphBatch.from_weights(*tensors(states), sign_mask=mask))
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    found = GraphBatch.from_state_dicts(states, sign_mask=mask)
    assert_same_features(found, GraphBatch.from_weights(*tensors(states), sign_mask=mask))
    mixed = [mask[0], True, mask[2]]
    found = GraphBatch.from_state_dicts(states, sign_mask=mixed)
    mask[1] = True
    assert_same_features(found, GraphBatch.from_weights(*tensors(states), sign_mask=mask))


@pytest.mark.parametrize(
    "names",
    [
        [("seq.{}.weight", "seq.{}.bias")],
        [("net.{}.linear.weight", "net.{}.linear.bias")],
        [("_orig_mod.module.layers.{}.kernel", "_orig_mod.module.layers.{}.bias")],
        [("w{}", "b{}")],
        [("first.weight", "first.bias"), ("second.weight", "second.bias"), ("third.weight", "third.bias")],
        [("alpha{}", "omega{}")],
    ],
)
@pytest.mark.parametrize("biases_first", [False, True])
def test_names_of_weights_and_biases(names, biases_first):
    plain = state()
    pairs = list(zip(list(plain.values())[::2], list(plain.values())[1::2], strict=True))
    renamed = {}
    for layer, (weight, bias) in enumerate(pairs):
        weight_name, bias_name = (name.format(layer) for name in names[min(layer, len(names) - 1)])
        items = [(weight_name, weight), (bias_name, bias)]
        renamed.update(reversed(items) if biases_first else items)
    assert_same_features(GraphBatch.from_state_dicts([renamed]), GraphBatch.from_state_dicts([plain]))


def test_layers_are_in_the_order_of_their_numbers():
    plain = state((2, *[3] * 12, 1))
    by_name = dict(sorted(plain.items()))  # as safetensors keeps them: seq.10 before seq.2
    assert list(by_name) != list(plain)
    assert_same_features(GraphBatch.from_state_dicts([by_name]), GraphBatch.from_state_dicts([plain]))


def test_names_given_choose_and_order_the_layers():
    plain = state()
    other = {f"{'zyx'[k // 2]}{k % 2}": value for k, value in enumerate(plain.values())}
    shuffled = {**{name: other[name] for name in ("x0", "y1", "z1", "x1", "y0", "z0")}, "step": torch.zeros(3, 3, 3)}
    names = [("z0", "z1"), ("y0", "y1"), ("x0", "x1")]
    found = GraphBatch.from_state_dicts([shuffled], names=names)
    assert_same_features(found, GraphBatch.from_state_dicts([plain]))


def test_a_missing_bias_is_zero():
    plain = state()
    del plain["seq.1.bias"]
    _, biases = GraphBatch.from_state_dicts([plain, state(seed=1)]).to_weights()
    assert torch.equal(biases[1][0], torch.zeros(3, 1))
    assert torch.equal(biases[1][1, :, 0], state(seed=1)["seq.1.bias"])
    weights_only = {name: value for name, value in plain.items() if "weight" in name}
    assert not any(bias.any() for bias in GraphBatch.from_state_dicts([weights_only]).to_weights()[1])


def conv_state(channels=(1, 4, 6), kernels=((3, 3), (3, 3)), linear=(10,), pixels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for layer, (n_in, n_out, kernel) in enumerate(zip(channels[:-1], channels[1:], kernels, strict=True)):
        out[f"conv.{layer}.weight"] = torch.randn(n_out, n_in, *kernel, generator=generator)
        out[f"conv.{layer}.bias"] = torch.randn(n_out, generator=generator)
    sizes = [channels[-1] * pixels, *linear]
    for layer, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        out[f"fc.{layer}.weight"] = torch.randn(n_out, n_in, generator=generator)
        out[f"fc.{layer}.bias"] = torch.randn(n_out, generator=generator)
    return out


@pytest.mark.parametrize(
    "kernels", [((3, 3), (3, 3)), ((5, 1), (3, 3)), ((1, 1), (3, 7)), ((4, 2), (1, 3)), ((2, 2), (3, 3))]
)
def test_padded_kernels_are_the_same_convolution(kernels):
    plain = conv_state(kernels=kernels)
    batch = GraphBatch.from_state_dicts([plain])
    assert batch.layouts == ((1, 4, 6, 10),)
    assert torch.equal(batch.node_features[-1:], torch.zeros(1, 1))  # a network with convolutions: input value 0
    height, width = (max(kernel[axis] for kernel in kernels) for axis in (0, 1))
    weights, _ = batch.to_weights()
    generator = torch.Generator().manual_seed(7)
    for layer, kernel in enumerate(kernels):
        original = plain[f"conv.{layer}.weight"]
        padded = weights[layer][0].permute(1, 0, 2).unflatten(2, (height, width))
        rows, columns = height - kernel[0], width - kernel[1]
        image = torch.randn(1, original.shape[1], 9, 9, generator=generator)
        wide = F.pad(image, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        torch.testing.assert_close(F.conv2d(wide, padded), F.conv2d(image, original))
        assert padded.count_nonzero() == original.count_nonzero()


def test_where_a_linear_weight_sits():
    plain = conv_state(kernels=((3, 5), (1, 1)))
    linear = plain["fc.0.weight"].T
    for options, tap in (({}, 7), ({"linear_tap": "centre"}, 7), ({"linear_tap": "first"}, 0)):
        weights, _ = GraphBatch.from_state_dicts([plain], **options).to_weights()
        assert torch.equal(weights[2][0, :, :, tap], linear)
        assert weights[2].count_nonzero() == linear.count_nonzero()
    weights, _ = GraphBatch.from_state_dicts([plain], kernel_size=(5, 7)).to_weights()
    assert weights[0].shape[-1] == 35
    assert torch.equal(weights[2][0, :, :, 17], linear)
    weights, _ = GraphBatch.from_state_dicts([state((2, 3))], kernel_size=(3, 3)).to_weights()
    assert torch.equal(weights[0][0, :, :, 4], state((2, 3))["seq.0.weight"].T)


@pytest.mark.parametrize(("pixels", "d_e"), [(4, 9), (16, 16)])
def test_flattened_channels_own_their_pixels(pixels, d_e):
    plain = conv_state(pixels=pixels, linear=(10, 3))
    batch = GraphBatch.from_state_dicts([plain])
    assert batch.layouts == ((1, 4, 6, 10, 3),)
    weights, _ = batch.to_weights()
    assert {w.shape[-1] for w in weights} == {d_e}
    images = torch.randn(2, 6, pixels, generator=torch.Generator().manual_seed(0))
    expected = F.linear(images.flatten(1), plain["fc.0.weight"])
    torch.testing.assert_close(torch.einsum("bcs,cos->bo", images, weights[2][0, :, :, :pixels]), expected)
    assert not weights[2][..., pixels:].any()
    assert torch.equal(weights[0][0, 0, :, :9].unflatten(1, (3, 3)), plain["conv.0.weight"][:, 0])
    assert torch.equal(weights[3][0, :, :, 4], plain["fc.1.weight"].T)


def test_architectures_may_differ_and_keep_their_order():
    states = [state((2, 3, 1)), conv_state(), state((2, 3, 1), seed=1), state((2, 3, 1), seed=2), conv_state(seed=3)]
    masks = [True, False, torch.tensor([True, False, False, True, False, True]), False, True]
    batch = GraphBatch.from_state_dicts(states, sign_mask=masks)
    assert batch.layouts == ((2, 3, 1), (1, 4, 6, 10), (2, 3, 1), (2, 3, 1), (1, 4, 6, 10))
    for number, (plain, mask) in enumerate(zip(states, masks, strict=True)):
        alone = GraphBatch.from_state_dicts([plain], kernel_size=(3, 3), sign_mask=[mask])
        rows = batch.plan.node_graph == number
        assert torch.equal(batch.node_features[rows], alone.node_features)
        assert torch.equal(batch.sign_mask[rows], alone.sign_mask)
        edges = batch.plan.node_graph[batch.plan.target.long()] == number
        assert torch.equal(batch.edge_features[edges], alone.edge_features)
    # input values by kind of network
    first = batch.plan.node_layer == 0
    assert batch.node_features[first].flatten().tolist() == [1, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("make", [lambda: state((2, 3, 1)), lambda: conv_state((1, 2, 2), ((2, 3), (1, 1)), (2,), 8)])
def test_gradients_reach_every_parameter(make):
    states = [{k: v.double().requires_grad_() for k, v in make().items()} for _ in range(2)]
    states.append({k: v.double().requires_grad_() for k, v in state((2, 2)).items()})
    leaves = list(itertools.chain.from_iterable(s.values() for s in states))

    def features(*leaves):
        values = iter(leaves)
        batch = GraphBatch.from_state_dicts([{name: next(values) for name in s} for s in states])
        return batch.node_features, batch.edge_features

    assert torch.autograd.gradcheck(features, leaves)


def test_dtype_is_kept():
    assert GraphBatch.from_state_dicts([state(dtype=torch.float64)]).dtype == torch.float64
    assert GraphBatch.from_state_dicts([{k: v.half() for k, v in conv_state().items()}]).dtype == torch.float16


BATCH_NORM = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).state_dict()
LAYER_NORM = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)).state_dict()


@pytest.mark.parametrize(
    ("states", "options", "error", "message"),
    [
        ([], {}, ValueError, "state_dicts must hold at least one network, got an empty list"),
        (state(), {}, TypeError, "state_dicts must be a list, one entry per network, got dict"),
        (
            [state(), nn.Linear(2, 1)],
            {},
            TypeError,
            r"state_dicts\[1\] must be a mapping of names to tensors, got Linear",
        ),
        ([{}], {}, ValueError, r"state_dicts\[0\] must hold at least one weight.*got \[\]"),
        ([{"a.weight": [1.0]}], {}, TypeError, r"state_dicts\[0\]\['a.weight'\] must be a torch.Tensor, got list"),
        ([BATCH_NORM], {}, ValueError, r"linear layers and convolutions, got '1.weight' of shape \[4\]"),
        ([LAYER_NORM], {}, ValueError, r"linear layers and convolutions, got '1.weight' of shape \[4\]"),
        ([nn.Conv1d(1, 2, 3).state_dict()], {}, ValueError, r"got 'weight' of shape \[2, 1, 3\]"),
        (
            [{**state(), "seq.1.weight": torch.zeros(3, 5)}],
            {},
            ValueError,
            r"\['seq.1.weight'\] must read the 4 neurons before it: expected 4 inputs, got shape \[3, 5\]",
        ),
        (
            [{**state(), "seq.1.weight": torch.zeros(3, 8)}],
            {},
            ValueError,
            "expected 4 inputs, got shape",
        ),
        (
            [{**conv_state(), "fc.0.weight": torch.zeros(10, 13)}],
            {},
            ValueError,
            r"'fc.0.weight'\] must read the 6 neurons.*expected 6, or a multiple of it after Flatten inputs, got",
        ),
        (
            [{**state(), "seq.0.bias": torch.zeros(5)}],
            {},
            ValueError,
            r"state_dicts\[0\]\['seq.0.bias'\] must have shape \[4\], got \[5\]",
        ),
        (
            [{**state(), "seq.9.bias": torch.zeros(5)}],
            {},
            ValueError,
            r"state_dicts\[0\] must hold a weight for every bias, got 'seq.9.bias' beside the weights",
        ),
        ([{"a.weight": torch.zeros(0, 3)}], {}, ValueError, r"\['a.weight'\].*got shape \[0, 3\]"),
        (
            [state(), state(dtype=torch.float64)],
            {},
            TypeError,
            r"\['seq.0.weight'\]: weight must be floating point of the first weight's dtype.*32, got torch.float64",
        ),
        (
            [state(), {k: v.to("meta") for k, v in state().items()}],
            {},
            ValueError,
            r"state_dicts\[1\]\['seq.0.weight'\]: weight must be on the first weight's device cpu, got meta",
        ),
        ([{k: v.long() for k, v in state().items()}], {}, TypeError, "must be floating point.*got torch.int64"),
        ([conv_state()], {"linear_tap": "last"}, ValueError, "linear_tap must be one of centre, first, got 'last'"),
        (
            [conv_state()],
            {"kernel_size": (3, 2)},
            ValueError,
            r"kernel_size must be at least the largest kernels, \(3, 3\)",
        ),
        ([conv_state()], {"kernel_size": 3}, TypeError, "kernel_size must be two integers, height and width, got 3"),
        (
            [state()],
            {"sign_mask": torch.tensor([True, False])},
            ValueError,
            "sign_mask must have one entry per network, 1, got 2",
        ),
        (
            [state()],
            {"sign_mask": torch.ones(1)},
            TypeError,
            r"sign_mask must be bool \[B\] or \[B, neurons\], got torch.float32",
        ),
        (
            [state()],
            {"sign_mask": True},
            TypeError,
            "sign_mask must be a bool tensor or a list of one per network, got bool",
        ),
        ([state()], {"sign_mask": [1]}, TypeError, r"sign_mask\[0\] must be a bool, got int"),
        (
            [state()],
            {"sign_mask": torch.ones(1, 9).bool()},
            ValueError,
            r"sign_mask\[0\] must have shape \[\] or \[10\], got \[9\]",
        ),
        (
            [state()],
            {"names": [("seq.0.weight", "b")]},
            KeyError,
            r"names: state_dicts\[0\] must hold 'b', got \['seq.0.weight'",
        ),
        (
            [state()],
            {"names": ["seq.0.weight"]},
            ValueError,
            r"names must hold one pair \(weight, bias or None\) per layer",
        ),
        ([state()], {"names": []}, ValueError, "names must hold one pair"),
        (
            [state()],
            {"names": [("seq.0.bias", None)]},
            ValueError,
            r"must be \[out, in\] or \[out, in, kh, kw\], got shape \[4\]",
        ),
    ],
)
def test_bad_input(states, options, error, message):
    with pytest.raises(error, match=message):
        GraphBatch.from_state_dicts(states, **options)
