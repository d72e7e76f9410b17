"""Diagonal Gaussians as beliefs: their product, and how far one is from the prior."""

from __future__ import annotations

import torch

MIN_VARIANCE = 1e-7
"""The least variance that a factor of a product counts with."""


def gaussian_product(mean: torch.Tensor, variance: torch.Tensor, dim: int = -2) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the product of Gaussians, ``V = 1 / sum_n 1/v_n`` and ``M = V sum_n m_n / v_n``.

    It is what several independent pieces of evidence say together (PEARL, arXiv:1903.08254), in whatever order they
    came: the variance falls with each. As in PEARL's code, the prior is no factor; it is the belief without evidence.

    Args:
        mean: means of the factors, ``[*, N, Z]``.
        variance: their variances, positive, of the same shape; raised to 1e-7 where they are less, so that no factor
            silences all others.
        dim: the dimension of size ``N`` that is multiplied over.

    Returns:
        Mean and variance ``[*, Z]``; those of the prior, 0 and 1, where ``N`` is 0.

    Raises:
        ValueError: means and variances are not of one shape.

    Examples:
        >>> mean, variance = gaussian_product(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [0.5]]))
        >>> mean.tolist(), round(variance.item(), 4)
        ([2.0], 0.3333)
    """
    if mean.shape != variance.shape:
        raise ValueError(
            f"gaussian_product: mean and variance must be of one shape, got {list(mean.shape)} and "
            f"{list(variance.shape)}. Expand the smaller."
        )
    if mean.shape[dim] == 0:
        return mean.sum(dim), variance.sum(dim) + 1
    precision = variance.clamp_min(MIN_VARIANCE).reciprocal()
    product = precision.sum(dim).reciprocal()
    return product * (precision * mean).sum(dim), product


def standard_normal_kl(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Computes ``KL(N(m, v) || N(0, 1)) = (v + m^2 - 1 - log v) / 2``, in nats, for each dimension.

    Args:
        mean: ``[*]``.
        variance: ``[*]``, positive.

    Returns:
        ``[*]``, not summed; zero for the prior itself.

    Examples:
        >>> standard_normal_kl(torch.tensor([0.0, 2.0]), torch.ones(2)).tolist()
        [0.0, 2.0]
    """
    return (variance + mean.square() - 1 - variance.log()) / 2
