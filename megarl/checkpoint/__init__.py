"""Weights and training state at rest: Hugging Face directories, Megatron checkpoints, conversion, export."""

from megarl import parallel  # noqa: F401  before the first import of megatron: it makes it run without CUDA
