"""A text-only policy asks of a layout what its decoder asks."""

from megarl.models.common.language import validate_language as validate

__all__ = ["validate"]
