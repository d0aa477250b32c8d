"""`accelerate` on the originals' own objects, at the published sizes; the fixtures say which checkouts it needs."""

import copy
import importlib.util
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compared import flat, gradients, trajectory

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


def assert_same_trajectory(make, loss_of, **options):
    """Losses of 20 steps of two models that ``make`` gives, the second one accelerated once its optimiser was made."""
    model, twin = make(), make()
    expected = trajectory(model, loss_of, **options)
    found = trajectory(twin, loss_of, begin=scalegmn_fast.accelerate, **options)
    assert scalegmn_fast.report(twin).parts[0].fused
    assert expected[-1] != expected[0]
    assert relative_error(found, expected) <= 1e-4


def _model(case, *args):
    return case(*args)[0]


def scalegmn_problem(name, dtype):
    problem = Problem(published_config(name), 2)
    if len(problem.weights) == len(FITTED["weights"]):
        for kind, deviations in FITTED.items():
            for tensor, deviation in zip(getattr(problem, kind), deviations, strict=True):
                tensor.mul_(deviation / tensor.square().mean().sqrt())
    problem.weights, problem.biases = ([t.to(dtype) for t in group] for group in (problem.weights, problem.biases))
    return problem


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


@pytest.mark.parametrize("name", published_names())
def test_scalegmns_own_model_stays_on_its_trajectory(name, scalegmn_root):
    """Editing at a tenth of the rate: at 1e-3 without warm-up its loss jumps, and one rounding moves it by 6e-3."""
    with imported(lambda: Original(scalegmn_root)) as original:
        _, inputs, problem = scalegmn_case(original, name, torch.float32)
        rate = 1e-4 if problem.config["scalegmn_args"]["equivariant"] else 1e-3
        make = partial(_model, scalegmn_case, original, name, torch.float32)
        assert_same_trajectory(make, lambda net: problem.loss(net(*inputs())), lr=rate)


def neural_graphs_case(original, name, dtype):
    config = without_dropout(neural_graphs_config(name))
    problem = problem_of(config, 2)
    problem.weights, problem.biases = ([t.to(dtype) for t in group] for group in (problem.weights, problem.biases))
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


@pytest.mark.parametrize("name", fixed_names())
def test_neural_graphs_own_model_stays_on_its_trajectory(name, neural_graphs_root):
    """The released rate is 1e-3 after 1000 steps of warm-up (editing: 10,000), which begins far below these."""
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        _, inputs, problem = neural_graphs_case(original, name, torch.float32)
        make = partial(_model, neural_graphs_case, original, name, torch.float32)
        rate = 1e-5 if is_editing(neural_graphs_config(name)) else 1e-4
        assert_same_trajectory(make, lambda net: problem.loss(net(*inputs())), lr=rate)


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


def cnn_case(root, original, name, dtype):
    config = without_dropout(neural_graphs_config(name))
    with default_dtype(dtype):
        torch.manual_seed(0)
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


@pytest.mark.parametrize("name", VARYING)
def test_neural_graphs_own_model_of_cnns_stays_on_its_trajectory(name, neural_graphs_root):
    with imported(lambda: OriginalNeuralGraphs(neural_graphs_root)) as original:
        _, inputs = cnn_case(neural_graphs_root, original, name, torch.float32)
        make, target = partial(_model, cnn_case, neural_graphs_root, original, name, torch.float32), [-1.0, 0.5, 2.0]

        def loss_of(net):  # never near 0, where a relative difference would be one of rounding
            return F.mse_loss(net(*inputs()).sigmoid().squeeze(-1), torch.tensor(target))

        assert_same_trajectory(make, loss_of, lr=1e-4)
