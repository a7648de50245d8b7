"""The configuration of a run: plain dataclasses, built in Python, overridden from the command line.

``megarl.experiment`` reads and overrides them, and a run writes the result to ``<run_dir>/config.yaml``. There is no
other place where a default can come from.
"""

from megarl.config.algorithm import AlgorithmConfig, CriticConfig
from megarl.config.model import CP_COMM_TYPES, PARTS, LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megarl.config.rollout import ENGINE_MEMORY, DataConfig, RewardConfig, RolloutConfig, TaskConfig, WeightSyncConfig
from megarl.config.run import (
    TRAINER_MEMORY,
    CheckpointConfig,
    DebugConfig,
    ObservabilityConfig,
    RunConfig,
    TrainerConfig,
)

__all__ = [
    "CP_COMM_TYPES",
    "ENGINE_MEMORY",
    "PARTS",
    "TRAINER_MEMORY",
    "AlgorithmConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "DebugConfig",
    "LoraConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrainerConfig",
    "WeightSyncConfig",
]
