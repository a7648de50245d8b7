"""Model families as Megatron-Core modules."""

from megarl.parallel import mcore_cpu

mcore_cpu.install()  # before any module here imports megatron
