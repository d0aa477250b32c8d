"""Schedules and optimisers by name."""

import pytest
import torch

from scalegmn_fast.train.optim import WarmupLRScheduler, build_optimizer, build_scheduler


def rates(scheduler, optimizer, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def make(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_warmup_is_linear_from_one_step_to_the_base_rate():
    optimizer = make()
    assert rates(WarmupLRScheduler(optimizer, 4), optimizer, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_warmup_of_one_step_is_constant():
    optimizer = make()
    assert rates(WarmupLRScheduler(optimizer, 1), optimizer, 3) == [0.5, 0.5, 0.5]


def test_warmup_continues_from_its_state():
    optimizer = make()
    scheduler = WarmupLRScheduler(optimizer, 5)
    whole = rates(scheduler, optimizer, 7)
    first, second = make(), make()
    a = WarmupLRScheduler(first, 5)
    part = rates(a, first, 3)
    b = WarmupLRScheduler(second, 5)
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    assert part + rates(b, second, 4) == whole


def test_step_lr_and_plateau():
    optimizer = make()
    scheduler = build_scheduler(optimizer, {"scheduler": "StepLR", "decay_steps": 2, "decay_rate": 0.1})
    assert rates(scheduler, optimizer, 5) == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
    optimizer = make()
    args = {"scheduler": "ReduceLROnPlateau", "scheduler_mode": "max", "decay_rate": 0.5, "patience": 0, "min_lr": 0.2}
    scheduler = build_scheduler(optimizer, args)
    seen = []
    for score in (1.0, 2.0, 2.0, 2.0, 2.0):
        scheduler.step(score)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.5, 0.5, 0.25, 0.2, 0.2]
    assert build_scheduler(optimizer, {"scheduler": None}) is None


def test_any_torch_optimiser_by_name():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([p], "Adam", {"lr": 0.1, "betas": [0.8, 0.9]})
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("name", "args"), [
    ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1, "amsgrad": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
])  # fmt: skip
def test_on_the_cpu_one_kernel_steps_all_parameters(name, args):
    """Unless the arguments say otherwise; to rounding the steps are the same."""
    stepped = []
    for options in (args, {**args, "fused": False}, {**args, "foreach": False}):
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (3, 50)]
        optimizer = build_optimizer(parameters, name, options)
        assert optimizer.defaults["fused"] is (True if options is args else options.get("fused"))
        for _ in range(3):
            optimizer.zero_grad()
            sum((p**3).sum() for p in parameters).backward()
            optimizer.step()
        stepped.append(torch.cat([p.detach() for p in parameters]))
    torch.testing.assert_close(stepped[0], stepped[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(stepped[1], stepped[2])


def test_an_optimiser_without_such_a_kernel_is_made_as_ever():
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], "RMSprop", {"lr": 0.1})
    assert type(optimizer) is torch.optim.RMSprop and "fused" not in optimizer.defaults


@pytest.mark.parametrize(("name", "args", "message"), [
    ("AdamV", {}, "nearest is 'Adam"),
    ("Optimizer", {}, "is not in torch.optim"),
    ("lr_scheduler", {}, "is not in torch.optim"),
    ("AdamW", {"weigth_decay": 0.1}, "nearest is 'weight_decay'"),
])  # fmt: skip
def test_unknown_optimiser_or_argument(name, args, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], name, args)
