"""What is compared of a model before and after `accelerate`: outputs, gradients, and losses of a few training steps."""

import torch


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
    return torch.tensor(losses)
