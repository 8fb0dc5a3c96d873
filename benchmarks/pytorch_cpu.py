"""PyTorch's optimizers on the CPU, to compare with: where PyTorch is installed."""

from collections.abc import Callable
from typing import Any

import numpy as np

Advance = Callable[[int], None]
NAMES = ("torch.optim.AdamW, fused", "torch, the source's AdaM3 loop")


def arms(gradients: tuple[list[np.ndarray], ...], rate: float) -> dict[str, Advance]:
    """Returns functions that take so many steps, by the name of the optimizer.

    Args:
        gradients: Trees of gradients, as lists, which alternate.
        rate: The learning rate.
    """
    import torch

    grads = [[torch.tensor(g) for g in tree] for tree in gradients]

    def fused_adamw() -> Advance:
        params = [torch.zeros_like(g, requires_grad=True) for g in grads[0]]
        for p, g in zip(params, grads[0], strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(params, lr=rate, fused=True)

        def advance(steps: int) -> None:
            for _ in range(steps):
                optimizer.step()

        return advance

    def plain_adam3() -> Advance:
        params = [torch.zeros_like(g) for g in grads[0]]
        state = [[torch.zeros_like(p) for _ in "mvs"] for p in params]
        taken = 0

        def advance(steps: int) -> None:
            nonlocal taken
            for _ in range(steps):
                taken += 1
                # They alternate, or (g - m)³ would fade into slow denormal numbers.
                for p, g, mvs in zip(params, grads[taken % 2], state, strict=True):
                    adam3_leaf(p, g, mvs, taken, rate)

        return advance

    return dict(zip(NAMES, (fused_adamw(), plain_adam3()), strict=True))


def adam3_leaf(p: Any, g: Any, mvs: list[Any], t: int, rate: float) -> None:
    """Takes a step on one tensor with the operations of the source's code, in place."""
    import torch

    b1, b2, b3, lam, tau, eps = 0.9, 0.999, 0.999, 0.01, 1.0, 1e-8
    m, v, s = mvs
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    s.mul_(b3).add_((g - m).pow(3), alpha=1 - b3)
    clipped = torch.sign(s) * torch.clamp(torch.abs(s), max=tau)
    momentum = m / (1 - b1**t) + lam * clipped
    scale = torch.sqrt(v / (1 - b2**t)).add(eps)
    p.addcdiv_(momentum, scale, value=-rate)
