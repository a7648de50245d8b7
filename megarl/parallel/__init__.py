"""Process groups, attention, and Megatron-Core on the CPU."""

from megarl.parallel import mcore_cpu

mcore_cpu.install()
