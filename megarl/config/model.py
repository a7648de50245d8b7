"""The policy: its weights, how ranks share it, how it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megarl.utils.checks import check_choice, check_not_negative, check_positive

CP_COMM_TYPES = ("all_gather", "a2a", "p2p")
PARTS = ["vision_tower", "projector", "decoder"]


@dataclass
class LoraConfig:
    """Low-rank adapters on linear layers; everything else is frozen, and is the reference of ``algorithm.kl_coef``."""

    rank: int = 0  # 0: no adapters, all parameters are trained
    alpha: float = 32.0  # what an adapter adds is scaled by alpha / rank
    use_rslora: bool = False  # scaled by alpha / sqrt(rank) instead
    # names of layers as PEFT matches them (q_proj, o_proj, down_proj, ...), or all-linear
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    parts: list[str] = field(default_factory=lambda: ["decoder"])  # of vision_tower | projector | decoder
    path: str = ""  # PEFT directory whose adapters to start from; empty: adapters that change nothing yet

    def __post_init__(self) -> None:
        check_not_negative("model.lora", self, "rank")
        check_positive("model.lora", self, "alpha")
        for part in self.parts:
            check_choice("model.lora.parts", part, PARTS)
        if self.rank and not (self.parts and self.target_modules):
            raise ValueError("model.lora.parts and model.lora.target_modules must name something to adapt")
        if self.path and not self.rank:
            raise ValueError(f"model.lora.path={self.path} needs model.lora.rank")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class ModelConfig:
    path: str = ""  # Hugging Face directory: config.json, safetensors, tokenizer, preprocessor
    factory: str = ""  # "module:function" that writes that directory (path, seed) when it does not exist
    # parameters and activations: float32 | bfloat16 (with float32 main parameters) | auto: bfloat16 on GPUs
    dtype: str = "auto"
    freeze: list[str] = field(default_factory=list)  # parts not trained: vision_tower | projector | decoder
    transformer_impl: str = "local"  # local (torch) | transformer_engine
    attention_backend: str = "auto"  # auto | sdpa | varlen, flex (CUDA); transformer_engine brings its own
    # activations dropped: none | selective = of recompute_modules | full = all within a layer | auto: on GPUs the
    # fastest of none, selective [core_attn, layernorm, mlp] and full that fits their memory
    recompute: str = "auto"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])  # and layernorm, mlp; when selective
    lora: LoraConfig = field(default_factory=LoraConfig)
    min_pixels: int = 0  # bounds of an image after resizing, in pixels; 0: as the preprocessor says
    max_pixels: int = 0
    megatron: dict[str, Any] = field(default_factory=dict)  # further fields of mcore's TransformerConfig, verbatim
    vision_megatron: dict[str, Any] = field(default_factory=dict)  # the same of the vision tower's

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ["auto", "float32", "bfloat16"])
        check_choice("model.transformer_impl", self.transformer_impl, ["local", "transformer_engine"])
        check_choice("model.attention_backend", self.attention_backend, ["auto", "sdpa", "varlen", "flex"])
        check_choice("model.recompute", self.recompute, ["auto", "none", "selective", "full"])
        for name in self.recompute_modules:
            check_choice("model.recompute_modules", name, ["core_attn", "layernorm", "mlp"])
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("model.recompute=selective needs model.recompute_modules")
        check_not_negative("model", self, "min_pixels", "max_pixels")
        if self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"model.min_pixels={self.min_pixels} is more than model.max_pixels={self.max_pixels}")
        if self.lora.rank and self.transformer_impl != "local":
            raise ValueError("model.lora needs model.transformer_impl=local: adapters do not fit fused layers")
        for part in self.freeze:
            check_choice("model.freeze", part, PARTS)
            if self.lora.rank and part in self.lora.parts:
                raise ValueError(f"model.freeze and model.lora.parts both name {part}")

    @property
    def params_dtype(self) -> str:
        """``dtype`` by its name in torch; where a run has not decided ``auto`` yet, a CPU's."""
        return "float32" if self.dtype == "auto" else self.dtype


@dataclass
class ParallelConfig:
    """Sizes of the model-parallel groups; data parallelism takes what is left of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 0  # pieces of the model on each pipeline rank; 0 or 1: not interleaved
    pipeline_layout: list[int] = field(default_factory=list)  # decoder layers of each piece, first to last; []: even
    context_parallel_size: int = 1  # ranks that share the tokens of every sequence
    cp_comm_type: str = "auto"  # all_gather (keys, values) | a2a (heads) | p2p (a ring); auto: what the layers do best
    expert_model_parallel_size: int = 1  # ranks of a stage, whatever tokens they have, that share a layer's experts
    # tensor-parallel ranks share the tokens between their layers too; null: on GPUs with several such ranks
    sequence_parallel: bool | None = None
    use_distributed_optimizer: bool = True  # shard the optimizer's state over data-parallel ranks
    # further fields of mcore's DistributedDataParallelConfig, verbatim: overlap_grad_reduce, bucket_size, ...
    ddp: dict[str, Any] = field(default_factory=dict)
    balance_vision: bool = True  # data- and context-parallel ranks share the images of a microbatch by their cost

    def __post_init__(self) -> None:
        check_positive("parallel", self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        check_positive("parallel", self, "context_parallel_size", "expert_model_parallel_size")
        check_choice("parallel.cp_comm_type", self.cp_comm_type, ["auto", *CP_COMM_TYPES])
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("parallel.sequence_parallel=True needs parallel.tensor_model_parallel_size > 1")
        check_not_negative("parallel", self, "virtual_pipeline_model_parallel_size")
        if self.interleaved and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} needs "
                "parallel.pipeline_model_parallel_size > 1"
            )
        if self.pipeline_layout and len(self.pipeline_layout) != self.num_pipeline_chunks:
            raise ValueError(
                f"parallel.pipeline_layout={list(self.pipeline_layout)} must have "
                f"{self.num_pipeline_chunks} entries, one for each of parallel.pipeline_model_parallel_size="
                f"{self.pipeline_model_parallel_size} x parallel.virtual_pipeline_model_parallel_size="
                f"{max(1, self.virtual_pipeline_model_parallel_size)}"
            )
        if any(layers < 0 for layers in self.pipeline_layout):
            raise ValueError(f"parallel.pipeline_layout={list(self.pipeline_layout)} must not hold negative numbers")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together see every token of a sequence in every layer."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that can be divided so: experts may be shared by more than see a sequence's tokens."""
        sharing = self.tensor_model_parallel_size * self.context_parallel_size
        return self.pipeline_model_parallel_size * math.lcm(sharing, self.expert_model_parallel_size)

    @property
    def replica_size(self) -> int:
        """The first ranks of a pipeline stage that together hold its weights, in whole groups."""
        return math.lcm(self.tensor_model_parallel_size, self.expert_model_parallel_size)

    @property
    def interleaved(self) -> bool:
        """Whether a pipeline rank holds several pieces of the model."""
        return self.virtual_pipeline_model_parallel_size > 1

    @property
    def num_pipeline_chunks(self) -> int:
        """Pieces that the decoder is cut into."""
        return self.pipeline_model_parallel_size * max(1, self.virtual_pipeline_model_parallel_size)

    def check_world(self, world_size: int) -> None:
        """Raise a ``ValueError`` that names the keys when ``world_size`` ranks cannot be divided so."""
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"{world_size} ranks cannot be divided by parallel.tensor_model_parallel_size="
                f"{self.tensor_model_parallel_size} x parallel.pipeline_model_parallel_size="
                f"{self.pipeline_model_parallel_size} x parallel.context_parallel_size={self.context_parallel_size}"
            )
        if world_size // self.pipeline_model_parallel_size % self.expert_model_parallel_size:
            raise ValueError(
                f"{world_size} ranks / parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size} "
                f"cannot be divided by parallel.expert_model_parallel_size={self.expert_model_parallel_size}"
            )


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_warmup_steps: int = 0
    lr_decay_style: str = "constant"  # constant | linear | cosine, from the warm-up to the last step
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # largest gradient norm
    # further fields of mcore's OptimizerConfig, verbatim: optimizer_cpu_offload, use_precision_aware_optimizer, ...
    megatron: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("optimizer.lr_decay_style", self.lr_decay_style, ["constant", "linear", "cosine"])
        check_not_negative("optimizer", self, "lr", "min_lr", "lr_warmup_steps", "weight_decay")
        check_positive("optimizer", self, "eps", "clip_grad")
        if self.min_lr and self.lr_decay_style == "constant":
            raise ValueError(f"optimizer.min_lr={self.min_lr} does nothing with optimizer.lr_decay_style=constant")
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr} must not be above optimizer.lr={self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={tuple(self.betas)} must lie in [0, 1)")
