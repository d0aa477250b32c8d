"""`from_cnns`: convolutional networks of varying architectures as graphs."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from scalegmn_fast.graph import Architecture, GraphBatch, from_cnns
from scalegmn_fast.testing import random_cnn


def generator():
    return torch.Generator().manual_seed(0)


def test_without_flattening_as_from_state_dicts():
    states = [random_cnn([2, 3, 4], [3], generator=generator()), random_cnn([2, 5], [4, 3], generator=generator())]
    ours, plain = from_cnns(states), GraphBatch.from_state_dicts(states)
    assert torch.equal(ours.edge_features, plain.edge_features)
    assert torch.equal(ours.node_features, plain.node_features)
    assert ours.layouts == ((2, 3, 4, 3), (2, 5, 4, 3))
    assert ours.architectures == (Architecture((True, True, False)), Architecture((True, False, False)))
    assert ours.architectures == plain.architectures


def network(state, x):
    """Output of a network with one convolution that a linear layer reads, ReLU between them."""
    maps = torch.relu(F.conv2d(x, state["0.weight"], state["0.bias"]))
    return F.linear(maps.flatten(1), state["1.weight"], state["1.bias"]), maps


def test_repeated_nodes_compute_the_network():
    """Neuron pixel * channels + channel takes the channel's kernel and that pixel's column."""
    state = random_cnn([1, 3], [2], kernels=[3], pixels=4, generator=generator())
    batch = from_cnns([state], flattening_method="repeat_nodes")
    weights, biases = batch.to_weights()
    x = torch.randn(1, 1, 4, 4, generator=generator(), dtype=torch.float64)
    expected, maps = network(state, x)
    values = maps.flatten(2).transpose(1, 2).reshape(1, -1)  # pixel by pixel, in each channel by channel
    assert torch.allclose(values @ weights[1][0, :, :, 4] + biases[1][0, :, 0], expected)
    kernels = state["0.weight"].flatten(2).transpose(0, 1)
    assert torch.equal(weights[0][0], kernels.repeat(1, 4, 1))
    assert torch.equal(biases[0][0, :, 0], state["0.bias"].repeat(4))
    assert batch.architectures == (Architecture((True, False), None, 4),)
    assert batch.architecture_table("channels").tolist() == [[-1, 3, -1]]


def test_original_pixel_order_keeps_columns():
    state = random_cnn([1, 3], [2], kernels=[3], pixels=4, generator=generator())
    batch = from_cnns([state], flattening_method="repeat_nodes", original_pixel_order=True)
    assert torch.equal(batch.to_weights()[0][1][0, :, :, 4], state["1.weight"].t())


def test_extra_layer_is_an_identity():
    state = random_cnn([1, 3], [2], kernels=[3], pixels=4, generator=generator())
    batch = from_cnns([state], flattening_method="extra_layer", activations=[["relu"]], linear_as_conv=False)
    weights, biases = batch.to_weights()
    x = torch.randn(1, 1, 4, 4, generator=generator(), dtype=torch.float64)
    expected, maps = network(state, x)
    kernels = weights[1][0].reshape(3, 12, 3, 3)[:, :, :2, :2]
    values = torch.einsum("bcp,cnp->bn", maps.flatten(2), kernels.flatten(2))
    assert torch.allclose(values @ weights[2][0, :, :, 0] + biases[2][0, :, 0], expected)
    assert not biases[1].any()
    assert batch.architectures == (Architecture((True, True, False), ("relu", "none")),)


def test_residual_connections():
    state = random_cnn([1, 3, 2, 4], [2], generator=generator())
    batch = from_cnns([state, state], residual_connections=[[-1, -1, 0]] * 2)
    dense = from_cnns([state])
    assert batch.num_edges == 2 * (dense.num_edges + 3)
    layer, position = batch.plan.index("node_layer"), batch.plan.index("node_position")
    source, target = batch.plan.index("source"), batch.plan.index("target")
    skips = (layer[target] == 3) & (layer[source] == 1)
    assert torch.equal(position[source][skips], position[target][skips]) and int(skips.sum()) == 6
    centre = F.one_hot(torch.tensor(4), 9).double()
    assert torch.equal(batch.edge_features[skips], centre.expand(6, -1))


def test_tables():
    states = [random_cnn([1, 3], [2], generator=generator()), random_cnn([1, 3, 2], [4, 2], generator=generator())]
    batch = from_cnns(states, activations=[["tanh"], ["relu", "none", "silu"]])
    assert batch.architecture_table("activations").tolist() == [[-1, 4, -1, -1, -1], [-1, 1, 0, 3, -1]]
    assert batch.architecture_table("linear").tolist() == [[-1, 0, 1, -1, -1], [-1, 0, 0, 1, 1]]
    joined = GraphBatch.cat([batch, GraphBatch.from_weights(*batch_weights(), input_value=0.0)])
    assert joined.architectures == (*batch.architectures, None)
    assert joined.architecture_table("linear").tolist()[2] == [-1] * 5
    for other in (pickle.loads(pickle.dumps(batch)), batch.to(dtype=torch.float32)):
        assert other.architectures == batch.architectures
        assert torch.equal(other.architecture_table("linear"), batch.architecture_table("linear"))


def batch_weights():
    return [torch.zeros(1, 1, 2, 9, dtype=torch.float64)], [torch.zeros(1, 2, 1, dtype=torch.float64)]


def test_gradients_reach_the_networks():
    state = {k: v.requires_grad_() for k, v in random_cnn([1, 3], [2], pixels=4, generator=generator()).items()}
    batch = from_cnns([state], flattening_method="repeat_nodes")
    (batch.edge_features.sum() + batch.node_features.sum()).backward()
    assert torch.equal(state["0.bias"].grad, torch.full((3,), 4.0, dtype=torch.float64))
    assert torch.equal(state["1.weight"].grad, torch.ones(2, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "reads 4 pixels of every channel: flattening_method must be one of .* got None"),
        (
            {"flattening_method": "pool"},
            ValueError,
            "flattening_method must be one of repeat_nodes, extra_layer or None",
        ),
        ({"activations": [["relu"], ["relu"]]}, ValueError, "activations must have one entry per network, 1, got 2"),
        ({"activations": [["relu", "tanh"]]}, ValueError, r"activations\[0\] must hold one name per hidden layer, 1"),
        ({"activations": [["swish"]]}, ValueError, "activations must be out of none, relu, .* got 'swish'"),
        ({"residual_connections": [[0]]}, ValueError, r"residual_connections\[0\]\[0\] must be -1 or a hidden layer"),
        ({"residual_connections": [[0, 1]]}, ValueError, r"residual_connections\[0\] must hold one number per hidden"),
        ({"kernel_size": (2, 2)}, ValueError, "kernel_size must be at least the largest kernels"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    state = random_cnn([1, 3], [2], pixels=4, generator=generator())
    options = {"flattening_method": "repeat_nodes", **options} if options else {}
    with pytest.raises(error, match=message):
        from_cnns([state], **options)


def test_odd_feature_maps_have_no_extra_layer():
    with pytest.raises(ValueError, match="needs a square feature map, got 6 pixels"):
        from_cnns([random_cnn([1, 3], [2], pixels=6)], flattening_method="extra_layer")
    with pytest.raises(TypeError, match="state_dicts must be a list"):
        from_cnns(random_cnn([1, 3], [2]))
