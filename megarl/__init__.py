"""megarl trains multimodal models with reinforcement learning on Megatron-Core, SGLang and Ray."""

__version__ = "0.1.0"
