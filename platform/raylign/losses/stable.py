"""Exponentials that stay finite in fp32, with finite and non-zero gradients."""

import math

import torch
from torch import Tensor

_TANGENT_FROM = 30.0  # e^30 = 1e13: its square times 1e8 still fits in fp32


def bounded_expm1(x: Tensor) -> Tensor:
    """e^x - 1 up to x = 30, its tangent beyond."""
    beyond = (x - _TANGENT_FROM).clamp_min(0.0)
    return torch.expm1(x.clamp_max(_TANGENT_FROM)) + math.exp(_TANGENT_FROM) * beyond


def bounded_exp(x: Tensor) -> Tensor:
    """e^x up to x = 30, its tangent beyond."""
    beyond = (x - _TANGENT_FROM).clamp_min(0.0)
    return torch.exp(x.clamp_max(_TANGENT_FROM)) + math.exp(_TANGENT_FROM) * beyond


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0."""
    # Each branch is exact on its side of -ln 2.
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
