"""The learning rate over a run."""

from __future__ import annotations

import math

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, *, steps: int, warmup: float, decay_end: float, final: float) -> float:
    """Learning rate of a step as a share of the peak: linear warm-up, then half a cosine, then constant.

    Args:
        step: Steps taken before this one, from 0.
        steps: Steps of the whole run.
        warmup: Share of the steps in warm-up; its first step already learns.
        decay_end: Share of the steps after which the rate stays at ``final``.
        final: The share of the peak that remains.

    Source:
        Fu et al. 2023 (arXiv:2212.14052): warm-up 1 %, cosine to 0.1 of the peak, ending at 75 % of the steps.
    """
    n_warmup = round(warmup * steps)
    n_decay_end = round(decay_end * steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    if step >= n_decay_end:
        return final
    progress = (step - n_warmup) / (n_decay_end - n_warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
