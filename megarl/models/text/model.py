"""The model of a text-only policy is ``models.common.LanguageModel`` itself."""

from megarl.models.common.language_model import LanguageModel as build

__all__ = ["build"]
