"""The adversarial losses, as functions of logits: Goodfellow et al. 2014, section 3, in the non-saturating form, and the
relativistic pairing loss (Jolicoeur-Martineau 2018, arXiv:1807.00734; with R1 and R2, Huang et al. 2025, arXiv:2501.05441).

Sigmoid and binary cross-entropy are one numerically stable function of the logit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, joined_by: str) -> Tensor:
    """Cross-entropy of real → 1 and fake → 0; each (batch,). ``joined_by`` is ``"mean"`` or ``"sum"`` of the halves."""
    real = binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    total = real + fake
    return total / 2 if joined_by == "mean" else total


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Cross-entropy of fake → 1: the generator wants its fakes taken for real. ``fake_logits`` is (batch,)."""
    return binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def relativistic_loss(difference: Tensor) -> Tensor:
    """Mean softplus of (batch,) differences of pairs' logits: fake - real for the discriminator, turned for the generator."""
    return softplus(difference).mean()
