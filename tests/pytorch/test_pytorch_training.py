"""Whole models: mixed precision, checkpointing, transforms, second derivatives, copies, threads and forks."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import graphs, labels, leaves, network, neural_graphs, scalegmn
from torch.utils.checkpoint import checkpoint

from scalegmn_fast.graph import GraphBatch

MODELS = {
    "scalegmn": scalegmn,
    "gnn": lambda: neural_graphs("gnn"),
    "transformer": lambda: neural_graphs("transformer"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def train(model, dtype=None, steps=12):
    """Losses of a few steps; ``dtype`` of autocast, with a scaler for float16."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4, enabled=dtype == torch.float16)
    batch, target, losses = graphs(9), labels(9), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale()


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_mixed_precision_trains_as_float32_does(make, dtype):
    expected, _ = train(make())
    found, scale = train(make(), dtype)
    assert expected[-1] < 0.99 * expected[0]
    assert found == pytest.approx(expected, rel=0.03)
    assert found != expected
    if dtype == torch.float16:
        assert scale == 8192.0  # doubled three times: no step was skipped


@every_model
def test_checkpointing_gives_the_same_gradients(make):
    model, batch = make(), graphs(9)
    plain = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()), allow_unused=True)
    again = torch.autograd.grad(
        checkpoint(model, batch, use_reentrant=False).square().sum(), list(model.parameters()), allow_unused=True
    )
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpointing_draws_the_same_dropout_masks():
    model, batch, found = scalegmn(dropout=0.3), graphs(9), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for run in (model, lambda g: checkpoint(model, g, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run(batch).square().sum(), parameters, materialize_grads=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_model
def test_functional_call_takes_other_parameters_and_their_gradients(make):
    model, other, batch = make(), make(), graphs(9)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    parameters = dict(other.named_parameters())
    out = torch.func.functional_call(model, parameters, (batch,))
    expected = other(batch)
    assert torch.equal(out, expected) and not torch.equal(out, model(batch))
    values = [p for p in parameters.values() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(out.sum(), values, materialize_grads=True),
        torch.autograd.grad(expected.sum(), values, materialize_grads=True),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_transforms_that_are_not_supported_say_so():
    model, (weights, biases), batch = scalegmn(), network(3), graphs(3)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (batch,)).sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(parameters)
    stacked = {name: torch.stack([value, value]) for name, value in parameters.items()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(loss)(stacked)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        last = weights[2]
        torch.func.jvp(lambda w: model(GraphBatch.from_weights([*weights[:2], w], biases)), (last,), (last,))


def outer_loss(model, rate=0.1):
    """Loss after one inner step that the model, a learnt optimiser, corrects; float64."""
    weights, biases = network(3, dtype=torch.float64)
    inputs = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(1, 5, 2)

    def fit(weights, biases):
        x = inputs
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = x @ w.reshape(w.shape[:3]) + b.reshape(b.shape[0], 1, -1)
            x = x.tanh() if k < len(weights) - 1 else x
        return (x - inputs.sum(-1, keepdim=True)).square().mean()

    values = [value.requires_grad_() for value in (*weights, *biases)]
    gradients = torch.autograd.grad(fit(weights, biases), values, create_graph=True)
    changed = leaves(model(GraphBatch.from_weights(gradients[:3], gradients[3:])))
    values = [v - rate * (g + c.reshape(v.shape)) for v, g, c in zip(values, gradients, changed, strict=True)]
    return fit(values[:3], values[3:])


def test_gradients_through_an_inner_step_equal_finite_differences():
    model = scalegmn(equivariant=True).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def moved(step):
        with torch.no_grad():
            for p, direction in zip(parameters, directions, strict=True):
                p.add_(direction, alpha=step)

    gradients = torch.autograd.grad(outer_loss(model), parameters, materialize_grads=True)
    found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    step, ends = 1e-5, []
    for move in (step, -2 * step):
        moved(move)
        ends.append(outer_loss(model).item())
    assert abs(found) > 1e-6
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


@every_model
def test_gradients_of_a_gradient_penalty_equal_finite_differences(make):
    model = make().double()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def penalty():
        weights, biases = network(3, dtype=torch.float64)
        out = model(GraphBatch.from_weights([w.requires_grad_() for w in weights], biases))
        slopes = torch.autograd.grad(out.square().sum(), weights, create_graph=True, materialize_grads=True)
        return sum(slope.square().sum() for slope in slopes)

    gradients = torch.autograd.grad(penalty(), parameters, materialize_grads=True)
    direction = [g / 10 for g in gradients]
    found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    length = 1e-6 / max(max(d.abs().max().item() for d in direction), 1e-30)
    ends = []
    for move in (length, -2 * length):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=move)
        ends.append(penalty().item())
    assert found > 0
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * length), rel=1e-4)


@every_model
def test_copies_and_pickles_are_models_of_their_own(make):
    model, batch = make(), graphs(3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(batch), model(batch))
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not torch.equal(other(batch), model(batch))


def test_two_threads_train_two_models():
    expected = {name: train(make())[0] for name, make in MODELS.items() if name != "gnn"}
    models, found = {name: MODELS[name]() for name in expected}, {}
    threads = [threading.Thread(target=lambda n=name: found.update({n: train(models[n])[0]})) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


class Embeddings(torch.utils.data.Dataset):
    """Outputs of a model, computed where the item is asked for."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(graphs(3, seed=index))


def test_models_run_in_forked_dataloader_workers():
    torch.set_num_threads(2)
    data = Embeddings(scalegmn())
    expected = [data[k] for k in range(4)]  # the engine's threads and buffers are in use before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found, wanted)
