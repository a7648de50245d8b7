"""Numbers as a person wants to read them."""

from __future__ import annotations

import math


def format_number(value: float) -> str:
    """``value`` in at most nine characters, with the digits that matter."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"
