"""What is compared of a model before and after `accelerate`: outputs, gradients, and losses of a few training steps."""

import torch

import scalegmn_fast


def flat(out):
    """The tensors of a vector or of edited networks."""
    return [out] if torch.is_tensor(out) else [*out[0], *out[1]]


def gradients(model, inputs):
    """(outputs, gradient of each parameter) for fixed random cotangents."""
    model.zero_grad(set_to_none=True)
    outputs = flat(model(*inputs))
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    torch.autograd.backward(outputs, cotangents)
    return [t.detach() for t in outputs], {name: p.grad for name, p in model.named_parameters()}


def trajectory(model, loss_of, *, begin=lambda model: None, steps=20, lr=1e-3):
    """Losses of training steps with clipping and AdamW; ``begin(model)`` runs after the optimiser was made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    begin(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


#: Largest relative difference of two trajectories.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
#: How often as far as a rounded original ours may be where training is unstable: there distances grow many times over
#: in a step, and three draws tell their order of magnitude.
FACTOR = 10


def rounds_weights(seed):
    """``begin`` of a `trajectory` whose weights are moved by one rounding, up or down, before every step."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def move(model, inputs):
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)

    return lambda model: model.register_forward_pre_hook(move)


def distances(found, expected):
    """Per step the largest difference so far, over the largest expected loss."""
    return (found - expected).abs().cummax(0).values / expected.abs().max()


def both(losses):
    """Losses of 20 steps with the original's forward and with ours.

    Args:
        losses: ``begin`` -> losses of the same model each time, after ``begin(model)``; see `trajectory`.
    """
    expected, found = losses(lambda model: None), losses(_accelerated)
    assert expected[-1] != expected[0]
    return expected, found


def assert_same_trajectory(losses, dtype):
    """The losses of `both` are the same to `TOLERANCES`."""
    expected, found = both(losses)
    assert distances(found, expected)[-1] <= TOLERANCES[dtype]


def assert_no_further_than_rounding(losses, dtype):
    """As `assert_same_trajectory`, or, where training is unstable: after every number of steps ours is at most `FACTOR`
    times as far from the original as the original is from itself with weights rounded before every step.
    """
    expected, found = both(losses)
    bound, distance = TOLERANCES[dtype], distances(found, expected)
    if not distance[-1] <= bound:
        rounded = torch.stack([distances(losses(rounds_weights(seed)), expected) for seed in range(3)])
        assert (distance <= FACTOR * rounded.max(0).values.clamp(min=bound / FACTOR)).all(), (distance, rounded)


def _accelerated(model):
    assert scalegmn_fast.report(scalegmn_fast.accelerate(model)).parts[0].fused
