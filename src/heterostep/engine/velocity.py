"""How each token's velocity changes.

From that follow the score that decides who gets more steps (HSA, arXiv 2605.06892) and the slope that a held velocity
goes along.

Shapes: B batch, N tokens, C values a token.
"""

from __future__ import annotations

import torch

# Near pure noise log(1 - sigma) has no end, and velocities go straight over sigma itself (docs/method.md).
MARGIN = 0.02


def drift_time(sigma: torch.Tensor) -> torch.Tensor:
    """What velocities, keys and values go nearly straight over: log(1 - sigma + 0.02), which rises as sigma falls.

    1 - sigma is the part of the signal in the latents. Over sigma itself a line through two evaluations overshoots, the
    more so the earlier and the farther it is followed: measured on the bundled model's dense runs (docs/method.md).

    Args:
        sigma: flow-matching noise levels, 0..1, of any shape.
    """
    return (1 - sigma + MARGIN).log()


def velocity_change(new: torch.Tensor, old: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
    """Relative L1 change of each token's velocity per unit of sigma, float32 [B, N].

    s_j = |v_j^new - v_j^old|_1 / |v_j^old|_1, over the sigma elapsed between the token's two evaluations.

    Args:
        new, old: velocities [B, N, C].
        elapsed: sigma that passed between the two, > 0, [B, N].
    """
    change = (new.float() - old.float()).abs().sum(-1)
    size = old.float().abs().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    return change / size.clamp_min(tiny) / elapsed.clamp_min(1e-6)


def velocity_slope(new: torch.Tensor, old: torch.Tensor, stride: torch.Tensor) -> torch.Tensor:
    """Change of each velocity per unit of `drift_time` between two evaluations, float32 [B, N, C].

    Along it a held velocity goes on. Over sigma, the whole slope would be the second-order Adams-Bashforth update.

    Args:
        new, old: velocities [B, N, C].
        stride: `drift_time` that passed between the two, > 0, [B, N].
    """
    return (new.float() - old.float()) / stride.clamp_min(1e-6)[..., None]
