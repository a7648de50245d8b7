"""What is asked, answered and rewarded, and the engines that answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megarl.utils.checks import check_choice, check_not_negative, check_positive

ENGINE_MEMORY = ("weights", "kv_cache", "cuda_graph")  # SGLang's names of what its memory saver can release


@dataclass
class DataConfig:
    train_files: list[str] = field(default_factory=list)  # JSONL, JSON or parquet, for tasks that read files
    val_files: list[str] = field(default_factory=list)
    media_folder: str = ""  # where paths of images and videos in them start; empty: at the file that names them
    prompt_key: str = "prompt"  # a text or messages; conversations for supervised training too
    image_key: str = "images"
    video_key: str = "videos"
    answer_key: str = "answer"
    target_key: str = "target"  # an expert's response or a list of them: supervised training, algorithm.expert_strategy
    # tokens, the last included; algorithm.expert_strategy leaves longer answers out and counts them. 0: as many as
    # rollout.max_new_tokens
    max_target_length: int = 0
    prompts_per_step: int = 16
    shuffle: bool = True
    max_prompt_length: int = 1024  # tokens, images included; longer prompts are dropped and counted
    max_length: int = 0  # the same of a conversation, in supervised training; 0: what a microbatch can hold
    filter_overlong_prompts: bool = True  # before the first step, keeping their lengths; False: as they are drawn
    max_image_pixels: int = 64_000_000  # a larger image or frame is refused before it is decoded
    max_video_pixels: int = 64_000_000_000  # a video with more in all its frames is refused before it is decoded
    max_media_bytes: int = 256 << 20  # a larger file of an image or a video is refused
    video_fps: float = 2.0  # frames a second that the model sees of a video
    max_video_frames: int = 768  # frames that the model sees of a video; of a longer one fewer a second

    def __post_init__(self) -> None:
        check_positive("data", self, "prompts_per_step", "max_prompt_length", "max_image_pixels", "max_video_pixels")
        check_positive("data", self, "max_media_bytes", "video_fps", "max_video_frames")
        check_not_negative("data", self, "max_target_length", "max_length")


@dataclass
class TaskConfig:
    path: str = ""  # "module:Class" of a megarl.tasks.Task
    weight: float = 1.0  # share of the prompts of a step
    reward: str = ""  # "module:function" or "file.py:function" with verl's signature; empty: the task's own
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardConfig:
    timeout_s: float = 30.0  # one call
    num_workers: int = 0  # processes that compute rewards; 0: one
    on_error: str = "raise"  # a reward that raises or hangs: raise | drop (the sample, counted)

    def __post_init__(self) -> None:
        check_choice("rewards.on_error", self.on_error, ["raise", "drop"])
        check_positive("rewards", self, "timeout_s")
        check_not_negative("rewards", self, "num_workers")


# ServerArgs that placement and the turns of memory rely on, and where they are said
_ENGINE_OWNED = {
    "tp_size": "rollout.tensor_parallel_size",
    "dp_size": "rollout.num_engines",
    "pp_size": "rollout.tensor_parallel_size",
    "nnodes": "rollout.tensor_parallel_size",
    "base_gpu_id": "trainer.placement",
    "gpu_id_step": "trainer.placement",
    "enable_memory_saver": "trainer.placement",
    "model_path": "model.path",
    "dtype": "rollout.dtype",
}


@dataclass
class RolloutConfig:
    group_size: int = 8  # samples of one prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    num_engines: int = 0  # 0: on GPUs as many as trainer.placement leaves room for, on a CPU one
    tensor_parallel_size: int = 1  # of one engine; its GPUs are neighbours on one node
    # of its memory, what a colocated engine gives to the ranks while they train: of weights | kv_cache | cuda_graph;
    # auto: all
    release: list[str] = field(default_factory=lambda: ["auto"])
    dtype: str = ""  # of the engine; empty: the model's
    eval_temperature: float = 0.0
    timeout_s: float = 600.0  # an engine that does nothing for so long is replaced; a long answer may take longer
    max_restarts: int = 3  # of engines, within restart_window_s; the next death ends the run
    restart_window_s: float = 3600.0  # restarts longer ago no longer count
    # with trainer.max_staleness: responses under way when weights change are computed anew from their tokens and go on
    # with the new weights; False: they are finished first, which is faster where they are short
    partial: bool = True
    engine: dict[str, Any] = field(default_factory=dict)  # further SGLang ServerArgs, verbatim

    def __post_init__(self) -> None:
        check_positive("rollout", self, "group_size", "max_new_tokens", "tensor_parallel_size")
        check_positive("rollout", self, "timeout_s", "restart_window_s", "temperature")
        check_not_negative("rollout", self, "eval_temperature", "max_restarts", "num_engines")
        for kind in self.release:
            check_choice("rollout.release", kind, ["auto", *ENGINE_MEMORY])
        if "auto" in self.release and len(self.release) > 1:
            raise ValueError(f"rollout.release={list(self.release)}: auto stands alone")
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"rollout.top_k={self.top_k} must be positive, or -1 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must lie in (0, 1]")
        for name, key in _ENGINE_OWNED.items():
            if name in self.engine:
                raise ValueError(f"rollout.engine.{name}: say it with {key}")
        if self.dtype:
            check_choice("rollout.dtype", self.dtype, ["float32", "bfloat16"])


@dataclass
class WeightSyncConfig:
    # tensor: CUDA IPC on each GPU, shared memory on a CPU | broadcast: NCCL, gloo | disk | auto: tensor where rank and
    # engine share a GPU, or a node without GPUs, else broadcast
    transport: str = "auto"
    # of a policy with model.lora: merged = its matrices, rounded to rollout.dtype | adapter = its adapters alone, which
    # the engine keeps beside the frozen matrices (decoder only)
    lora: str = "merged"
    bucket_bytes: int = 512 << 20
    verify: bool = True  # compare every tensor's checksum on both sides after each sync
    canary: bool = True  # score one prompt with an image on both sides after each sync
    # float32: largest |difference of log-probs|, 0: 1e-4; bfloat16: mean |difference of probabilities|, 0: 0.03
    canary_tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_choice("weight_sync.transport", self.transport, ["auto", "tensor", "broadcast", "disk"])
        check_choice("weight_sync.lora", self.lora, ["merged", "adapter"])
        check_not_negative("weight_sync", self, "canary_tolerance")
        check_positive("weight_sync", self, "bucket_bytes")
