"""Relative errors of tensors, for the tests of a device."""

from collections.abc import Sequence

from torch import Tensor


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in float64."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def worst_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of the relative errors of several tensors."""
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
