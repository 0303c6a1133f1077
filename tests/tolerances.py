"""How close is close, once, each with its reason. Tests name a tolerance; they never invent one.

``relative`` is measured per layer against the layer's largest magnitude, not per element: an update is one vector per
layer, and an element that happens to be near zero carries the rounding of the large ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |got - expected| is ``relative * max|expected| + absolute`` per layer, for the stated reason."""

    relative: float
    reason: str
    absolute: float = 0.0


TOLERANCE = {
    "bitwise": Tolerance(0.0, "the same operations in the same order, or no operation at all"),
    "float64": Tolerance(1e-12, "50 steps of about 20 roundings of 1.1e-16 each, in any order of summation"),
    "float32": Tolerance(1e-6, "50 steps of lr <= 0.01 that each carry a few roundings of 6e-8, plus the weight's own"),
    "float32 ratio": Tolerance(1e-5, "opposing gradients cancel in ||u||; what is left carries their rounding"),
    "compiled": Tolerance(1e-6, "Inductor contracts a*b+c into one rounding and reorders sums; float32 otherwise"),
    "sharded": Tolerance(2e-6, "float32 partial norms summed in the order of ranks instead of one sweep"),
    "bf16 weight": Tolerance(2**-8, "the fp32 master rounded once to 8 significant bits: half an ulp is 2^-8"),
    "fp16 weight": Tolerance(2**-11, "the fp32 master rounded once to 11 significant bits", absolute=2**-25),
    "identity": Tolerance(1e-10, "an algebraic identity of the update, reached through a few cancelling operations"),
}


def to_numpy(value: Any) -> np.ndarray:
    """float64 copy of a tensor (of any dtype, layout or requires_grad), array or number."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.array(value, dtype=np.float64)


def relative_error(got: Any, expected: Any) -> float:
    """max|got - expected| / max|expected|; the plain difference where ``expected`` is all zeros, inf for NaNs."""
    got, expected = to_numpy(got), to_numpy(expected)
    assert got.shape == expected.shape, f"shape {got.shape} instead of {expected.shape}"
    if expected.size == 0:
        return 0.0
    scale = np.abs(expected).max()
    error = np.abs(got - expected).max() / (scale if scale > 0 else 1.0)
    return float(error) if np.isfinite(error) else float("inf")


def assert_close(got: Any, expected: Any, tolerance: str, label: str = "value") -> None:
    """Fail unless ``got`` agrees with ``expected`` within the named tolerance. Mappings are compared key by key.

    Raises:
        AssertionError: naming layer, error, tolerance and the tolerance's reason.
        KeyError: a tolerance that is not in the table.
    """
    allowed = TOLERANCE[tolerance]
    if isinstance(expected, Mapping):
        assert set(got) == set(expected), f"{label}: keys {sorted(got)} instead of {sorted(expected)}"
        for key in expected:
            assert_close(got[key], expected[key], tolerance, f"{label}[{key}]")
        return
    got, expected = to_numpy(got), to_numpy(expected)
    assert got.shape == expected.shape, f"{label}: shape {got.shape} instead of {expected.shape}"
    if expected.size == 0:
        return
    limit = allowed.relative * np.abs(expected).max() + allowed.absolute
    error = np.abs(got - expected).max()
    # Written so that a NaN on either side fails.
    assert error <= limit, f"{label}: off by {error:.3e}, allowed {limit:.3e} ({tolerance}: {allowed.reason})"
