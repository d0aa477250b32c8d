"""`accelerate` on the originals' own objects, at the published sizes; the fixtures say which checkouts it needs."""

import copy
import importlib.util
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compared import assert_no_further_than_rounding, assert_same_trajectory, flat, gradients, trajectory

import scalegmn_fast
from bench.compare_neural_graphs import is_editing, problem_of
from bench.compare_neural_graphs import names as fixed_names
from bench.original import Original
from bench.original_neural_graphs import OriginalNeuralGraphs
from bench.training import Problem
from scalegmn_fast.models import neural_graphs_config, neural_graphs_names, published_config, published_names
from scalegmn_fast.testing import randomize_parameters, relative_error

#: Standard deviations per layer of INRs fitted to MNIST: at larger ones the sines of an editing loss make chaos.
FITTED = {"weights": (0.063, 0.018, 0.118), "biases": (0.021, 0.011, 0.1)}

#: Learning rate of Neural Graphs' released configurations.
RATE = 1e-3
#: Trajectories are up to a hundred steps of an original at its published size.
long = pytest.mark.timeout(900)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@contextmanager
def imported(make):
    """What ``make`` returns; the modules that it put in the place of others are gone afterwards."""
    before = set(sys.modules)
    try:
        yield make()
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("src", "nn"):
                del sys.modules[name]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def without_dropout(config):
    """A configuration with every rate at 0: ours draws other masks."""
    if not isinstance(config, dict):
        return config
    return {key: 0.0 if key == "dropout" else without_dropout(value) for key, value in config.items()}


def assert_same_numbers(model, inputs):
    """Outputs, gradients, parameter objects and state dicts in float64, and the state dict's way there and back."""
    fresh = copy.deepcopy(model)
    randomize_parameters(model, spread=0.1, generator=torch.Generator().manual_seed(0))
    model.eval()
    outputs, grads = gradients(model, inputs())
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    assert scalegmn_fast.accelerate(model) is model
    assert scalegmn_fast.report(model).parts[0].fused, scalegmn_fast.report(model)
    ours, our_grads = gradients(model, inputs())
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(ours, outputs, strict=True))
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    for key, grad in grads.items():
        assert (grad is None) == (our_grads[key] is None), key
        if grad is not None:
            assert float((our_grads[key] - grad).abs().max()) <= 1e-8 * float(grad.abs().max()) + 1e-11 * largest, key
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    fresh.load_state_dict(model.state_dict(), strict=True)
    scalegmn_fast.accelerate(fresh).load_state_dict(fresh.state_dict(), strict=True)
    scalegmn_fast.restore(fresh)
    assert all(torch.equal(a, b) for a, b in zip(flat(fresh.eval()(*inputs())), outputs, strict=True))


def losses_of(case, dtype, rate):
    """``begin`` -> losses, for ``case(dtype)``: a model, and the loss of a model."""

    def losses(begin):
        with default_dtype(dtype):
            model, loss_of = case(dtype)
            return trajectory(model, loss_of, begin=begin, lr=rate)

    return losses


def with_loss(case, *args):
    """(model, loss of a model on the networks of a case)."""
    model, inputs, problem = case(*args)
    return model, lambda net: problem.loss(net(*inputs()))


def in_dtype(problem, dtype):
    """The problem, its floating-point tensors in ``dtype``."""
    problem.weights, problem.biases = ([t.to(dtype) for t in group] for group in (problem.weights, problem.biases))
    for name in ("points", "target"):
        value = getattr(problem, name, None)
        if value is not None and value.is_floating_point():
            setattr(problem, name, value.to(dtype))
    return problem


def scalegmn_problem(name, dtype):
    problem = Problem(published_config(name), 2)
    if len(problem.weights) == len(FITTED["weights"]):
        for kind, deviations in FITTED.items():
            for tensor, deviation in zip(getattr(problem, kind), deviations, strict=True):
                tensor.mul_(deviation / tensor.square().mean().sqrt())
    return in_dtype(problem, dtype)


def scalegmn_case(original, name, dtype):
    """(the original's model, a function that makes arguments of its call, the networks and their loss)."""
    config, problem = without_dropout(original.config(name)), scalegmn_problem(name, dtype)
    torch.manual_seed(0)
    model = original.model(config).to(dtype)
    with default_dtype(dtype):
        batch = original.batch(config, *problem.on_host(), problem.input_value, problem.sign_mask)
    return model, lambda: (copy.copy(batch), problem.weights, problem.biases), problem


@pytest.mark.parametrize("name", published_names())
def test_scalegmns_own_model_gives_its_numbers(name, scalegmn_root):
    with imported(lambda: Original(scalegmn_root)) as original:
        model, inputs, _ = scalegmn_case(original, name, torch.float64)
        assert_same_numbers(model, inputs)


@long
@both_dtypes
@pytest.mark.parametrize("name", published_names())
def test_scalegmns_own_model_stays_on_its_trajectory(name, dtype, scalegmn_root):
    """At rates above those of the first steps of a published run, which has a warm-up."""
    rate = 1e-4 if published_config(name)["scalegmn_args"]["equivariant"] else 1e-3
    with imported(lambda: Original(scalegmn_root)) as original:
        assert_same_trajectory(losses_of(partial(with_loss, scalegmn_case, original, name), dtype, rate), dtype)


@long
@both_dtypes
@pytest.mark.parametrize("name", published_names())
def test_scalegmns_own_model_without_warm_up_parts_no_further_than_rounding(name, dtype, scalegmn_root):
    rate = float(published_config(name)["optimization"]["optimizer_args"]["lr"])
    with imported(lambda: Original(scalegmn_root)) as original:
        assert_no_further_than_rounding(
            losses_of(partial(with_loss, scalegmn_case, original, name), dtype, rate), dtype
        )


def neural_graphs_case(original, name, dtype):
    config = without_dropout(neural_graphs_config(name))
    problem = in_dtype(problem_of(config, 2), dtype)
    with default_dtype(dtype):
        torch.manual_seed(0)
        model = original.model(config).to(dtype)
    return model, lambda: ((tuple(problem.weights), tuple(problem.biases)),), problem


@pytest.mark.parametrize("name", fixed_names())
def test_neural_graphs_own_model_gives_its_numbers(name, neural_graphs_root):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        model, inputs, _ = neural_graphs_case(original, name, torch.float64)
        with default_dtype(torch.float64):
            assert_same_numbers(model, inputs)


@long
@both_dtypes
@pytest.mark.parametrize("name", fixed_names())
def test_neural_graphs_own_model_stays_on_its_trajectory(name, dtype, neural_graphs_root):
    """At rates above those of the first steps of a released run: its warm-up has 1000 steps (editing: 10,000)."""
    rate = 1e-5 if is_editing(neural_graphs_config(name)) else 1e-4
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        assert_same_trajectory(losses_of(partial(with_loss, neural_graphs_case, original, name), dtype, rate), dtype)


@long
@both_dtypes
@pytest.mark.parametrize("name", fixed_names())
def test_neural_graphs_own_model_without_warm_up_parts_no_further_than_rounding(name, dtype, neural_graphs_root):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        losses = losses_of(partial(with_loss, neural_graphs_case, original, name), dtype, RATE)
        assert_no_further_than_rounding(losses, dtype)


# -- Neural Graphs on CNNs of varying architectures ------------------------------------------------------------------

VARYING = [name for name in neural_graphs_names() if name not in fixed_names()]


def cnn_batch(root, config, dtype):
    """The original's PyG batch of random CNNs: of one architecture for the zoo, of three for the park."""
    from torch_geometric.data import Batch

    path = root / "experiments/cnn_generalization/utils.py"
    spec = importlib.util.spec_from_file_location("original_cnn_utilities", path)
    utilities = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utilities)
    features, first, last = config["graph_constructor"], config["input_channels"], config["num_classes"]
    park = features.get("num_layer_types") or features["d_edge_in"] > 9
    side = int(features["d_edge_in"] ** 0.5)
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for hidden in ([4], [5, 6], [4, 5, 6]) if park else ([16, 16, 16],) * 3:
        layout = [first, *hidden, last]
        weights, biases = [], []
        for n_in, n_out in zip(layout[:-1], layout[1:], strict=True):
            linear = n_out == last
            weight = 0.3 * torch.randn(n_in, n_out, *((1, 1) if linear else (3, 3)), generator=generator)
            if linear and not features["linear_as_conv"]:
                weights.append(weight.flatten(2).to(dtype))
            else:
                weights.append(utilities.pad_and_flatten_kernel(weight, (side, side)).to(dtype))
            biases.append(0.3 * torch.randn(n_out, 1, generator=generator).to(dtype))
        options = {"residual_connections": [-1] * len(hidden), "activations": ["relu", "gelu", "tanh"][: len(hidden)]}
        convolutions = [1] * len(hidden) + [0]
        graphs.append(
            utilities.cnn_to_tg_data(
                tuple(weights),
                tuple(biases),
                convolutions,
                fmap_size=1,
                y=0.5,
                layer_layout=layout,
                **(options if park else {}),
            )  # fmt: skip
        )
    return Batch.from_data_list(graphs)


#: The draw of their weights: one whose training the original repeats when its weights are rounded. In others (of
#: cnn_zoo/pna 0, 1 and 3) two messages of a node are so nearly equal that rounding decides which is the extreme, and a
#: run of the original parts from another by 1e-3 within 20 steps.
DRAW = 2


def cnn_case(root, original, name, dtype):
    config = without_dropout(neural_graphs_config(name))
    with default_dtype(dtype):
        torch.manual_seed(DRAW)
        model = original.model(config).to(dtype)
        batch = cnn_batch(root, config, dtype)
    return model, lambda: (copy.deepcopy(batch),)


@pytest.mark.parametrize("name", VARYING)
def test_neural_graphs_own_model_of_cnns_gives_its_numbers(name, neural_graphs_root):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        model, inputs = cnn_case(neural_graphs_root, original, name, torch.float64)
        with default_dtype(torch.float64):
            assert_same_numbers(model, inputs)


def test_edges_marked_otherwise_run_on_the_original(neural_graphs_root):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        model, inputs = cnn_case(neural_graphs_root, original, "cnn_zoo/pna", torch.float32)
        (batch,) = inputs()
        batch.mlp_edge_masks = torch.zeros_like(batch.mlp_edge_masks)
        expected = model.eval()(copy.deepcopy(batch))
        assert torch.equal(scalegmn_fast.accelerate(model)(batch), expected)
        assert "mlp_edge_masks must mark the edges into linear layers" in scalegmn_fast.report(model).parts[0].reason


def cnn_losses(root, original, name, dtype, rate):
    def case(dtype):
        model, inputs = cnn_case(root, original, name, dtype)
        target = torch.tensor([-1.0, 0.5, 2.0], dtype=dtype)  # no loss near 0, where rounding would be most of it
        return model, lambda net: F.mse_loss(net(*inputs()).sigmoid().squeeze(-1), target)

    return losses_of(case, dtype, rate)


@long
@both_dtypes
@pytest.mark.parametrize("name", VARYING)
def test_neural_graphs_own_model_of_cnns_stays_on_its_trajectory(name, dtype, neural_graphs_root):
    """At a rate above those of the first steps of a released run, which has a warm-up."""
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        assert_same_trajectory(cnn_losses(neural_graphs_root, original, name, dtype, 1e-4), dtype)


@long
@both_dtypes
@pytest.mark.parametrize("name", VARYING)
def test_neural_graphs_own_model_of_cnns_without_warm_up_parts_no_further_than_rounding(
    name, dtype, neural_graphs_root
):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        assert_no_further_than_rounding(cnn_losses(neural_graphs_root, original, name, dtype, RATE), dtype)
