"""The configuration of a run: plain dataclasses, built in Python, overridden from the command line.

``megarl.experiment`` reads and overrides them, and a run writes the result to ``<run_dir>/config.yaml``. There is no
other place where a default can come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megarl.utils.checks import check_choice
from megarl.utils.checks import check_not_negative as _check_not_negative
from megarl.utils.checks import check_positive as _check_positive

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
        _check_not_negative("model.lora", self, "rank")
        _check_positive("model.lora", self, "alpha")
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
    dtype: str = "float32"  # parameters and activations: float32 | bfloat16 (with float32 main parameters)
    freeze: list[str] = field(default_factory=list)  # parts not trained: vision_tower | projector | decoder
    transformer_impl: str = "local"  # local (torch) | transformer_engine
    attention_backend: str = "auto"  # auto | sdpa | varlen, flex (CUDA); transformer_engine brings its own
    recompute: str = "none"  # activations dropped: none | selective = of recompute_modules | full = all within a layer
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])  # and layernorm, mlp; when selective
    lora: LoraConfig = field(default_factory=LoraConfig)
    min_pixels: int = 0  # bounds of an image after resizing, in pixels; 0: as the preprocessor says
    max_pixels: int = 0
    megatron: dict[str, Any] = field(default_factory=dict)  # further fields of mcore's TransformerConfig, verbatim

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ["float32", "bfloat16"])
        check_choice("model.transformer_impl", self.transformer_impl, ["local", "transformer_engine"])
        check_choice("model.attention_backend", self.attention_backend, ["auto", "sdpa", "varlen", "flex"])
        check_choice("model.recompute", self.recompute, ["none", "selective", "full"])
        for name in self.recompute_modules:
            check_choice("model.recompute_modules", name, ["core_attn", "layernorm", "mlp"])
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("model.recompute=selective needs model.recompute_modules")
        _check_not_negative("model", self, "min_pixels", "max_pixels")
        if self.lora.rank and self.transformer_impl != "local":
            raise ValueError("model.lora needs model.transformer_impl=local: adapters do not fit fused layers")
        for part in self.freeze:
            check_choice("model.freeze", part, PARTS)
            if self.lora.rank and part in self.lora.parts:
                raise ValueError(f"model.freeze and model.lora.parts both name {part}")


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
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True  # shard the optimizer's state over data-parallel ranks
    balance_vision: bool = True  # data- and context-parallel ranks share the images of a microbatch by their cost

    def __post_init__(self) -> None:
        _check_positive("parallel", self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        _check_positive("parallel", self, "context_parallel_size", "expert_model_parallel_size")
        check_choice("parallel.cp_comm_type", self.cp_comm_type, ["auto", *CP_COMM_TYPES])
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("parallel.sequence_parallel=True needs parallel.tensor_model_parallel_size > 1")
        _check_not_negative("parallel", self, "virtual_pipeline_model_parallel_size")
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

    def __post_init__(self) -> None:
        check_choice("optimizer.lr_decay_style", self.lr_decay_style, ["constant", "linear", "cosine"])
        _check_not_negative("optimizer", self, "lr", "min_lr", "lr_warmup_steps", "weight_decay")
        _check_positive("optimizer", self, "eps", "clip_grad")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={tuple(self.betas)} must lie in [0, 1)")


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
    # the same of a prompt with its response, or a conversation, in supervised training; 0: what a microbatch can hold
    max_length: int = 0
    filter_overlong_prompts: bool = (
        True  # before the first step, the lengths kept for the next start; False: when drawn
    )
    max_image_pixels: int = 64_000_000  # a larger image or frame is refused before it is decoded
    max_video_pixels: int = 64_000_000_000  # a video with more in all its frames is refused before it is decoded
    max_media_bytes: int = 256 << 20  # a larger file of an image or a video is refused
    video_fps: float = 2.0  # frames a second that the model sees of a video
    max_video_frames: int = 768  # frames that the model sees of a video; of a longer one fewer a second

    def __post_init__(self) -> None:
        _check_positive("data", self, "prompts_per_step", "max_prompt_length", "max_image_pixels", "max_video_pixels")
        _check_positive("data", self, "max_media_bytes", "video_fps", "max_video_frames")
        _check_not_negative("data", self, "max_target_length")
        _check_not_negative("data", self, "max_length")


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
        _check_positive("rewards", self, "timeout_s")
        _check_not_negative("rewards", self, "num_workers")


@dataclass
class RolloutConfig:
    group_size: int = 8  # samples of one prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    num_engines: int = 1
    tensor_parallel_size: int = 1  # of one engine
    dtype: str = ""  # of the engine; empty: the model's
    eval_temperature: float = 0.0
    timeout_s: float = 600.0  # a call to an engine that takes longer counts as the engine's death
    max_restarts: int = 3  # of engines, over the run
    # with trainer.max_staleness: responses under way when weights change are computed anew from their tokens and go on
    # with the new weights; False: they are finished first, which is faster where they are short
    partial: bool = True
    engine: dict[str, Any] = field(default_factory=dict)  # further SGLang ServerArgs, verbatim

    def __post_init__(self) -> None:
        _check_positive("rollout", self, "group_size", "max_new_tokens", "num_engines", "tensor_parallel_size")
        _check_positive("rollout", self, "timeout_s", "temperature")
        _check_not_negative("rollout", self, "eval_temperature", "max_restarts")
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"rollout.top_k={self.top_k} must be positive, or -1 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must lie in (0, 1]")
        if self.dtype:
            check_choice("rollout.dtype", self.dtype, ["float32", "bfloat16"])


@dataclass
class WeightSyncConfig:
    transport: str = "tensor"  # tensor (shared memory, CUDA IPC) | broadcast (gloo, NCCL) | disk
    # of a policy with model.lora: merged = its matrices, rounded to rollout.dtype | adapter = its adapters alone, which
    # the engine keeps beside the frozen matrices (decoder only)
    lora: str = "merged"
    bucket_bytes: int = 512 << 20
    verify: bool = True  # compare every tensor's checksum on both sides after each sync
    canary: bool = True  # score one prompt with an image on both sides after each sync
    canary_tolerance: float = 0.0  # largest |difference of log-probs|; 0: 1e-4 in float32, 0.1 in bfloat16

    def __post_init__(self) -> None:
        check_choice("weight_sync.transport", self.transport, ["tensor", "broadcast", "disk"])
        check_choice("weight_sync.lora", self.lora, ["merged", "adapter"])
        _check_not_negative("weight_sync", self, "canary_tolerance")
        _check_positive("weight_sync", self, "bucket_bytes")


@dataclass
class AlgorithmConfig:
    """An algorithm as a row of choices: names in the registries of ``megarl.algorithms`` and the knobs of those.

    ``megarl.algorithms.presets`` has the rows of the literature. Knobs with the name of a choice are read by it alone.
    """

    plugins: list[str] = field(default_factory=list)  # Python files that register advantages and policy losses
    advantage: str = "grpo"
    policy_loss: str = "ppo_clip"
    loss_weights: str = "token_mean"  # sequence_mean | sequence_sum | sequence_sum_norm | prompt_mean
    num_minibatches: int = 1  # optimizer steps on one rollout
    num_epochs: int = 1  # passes over one rollout

    # rewards, before advantages
    filter_key: str = ""  # train only on groups whose rewards of this name differ (DAPO: the accuracy); empty: on all
    filter_low: float = -math.inf  # and whose mean of it lies above
    filter_high: float = math.inf  # and below
    filter_max_rounds: int = 0  # of generation to fill a step with such groups, then it is trained as it is; 0: no end
    filter_truncated: bool = False  # do not train on responses cut at rollout.max_new_tokens
    overlong_buffer: float = 0.0  # fraction of rollout.max_new_tokens at its end where length is punished; 0: none
    overlong_penalty: float = 1.0  # taken from the reward at the very end of that buffer, linearly less before

    # advantages
    std: str = "group"  # what divides rewards minus their mean: the deviation in the group | step | none
    std_epsilon: float = 1e-6  # added to that deviation
    advantage_clip: float = math.inf  # largest size of an advantage
    reward_weights: dict[str, float] = field(default_factory=dict)  # of the named rewards: multi_reward, gdpo
    gamma: float = 1.0  # discount: gae, reinforce_plus_plus
    lam: float = 1.0  # gae
    gpg_scale: str = "informative"  # samples counted in alpha: of groups that differ (paper) | nonzero (authors' code)
    success_reward: float = 1.0  # from which a response counts as right: srft, expert_gate

    # policy losses; a bound of .inf is none
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_dual: float = 3.0  # bound of the ratio where the advantage is negative, > 1; 0: none
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    clip_cov_ratio: float = 2e-4  # share of the step's actions
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_ratio: float = 2e-4  # share of the step's actions
    kl_cov_coef: float = 1.0

    # losses that learn from an expert's actions too: luffy, srft, ppo_sft, chord. An expert's answers (data.target_key)
    # take part as whole samples of a group (random), as hints that samples go on from (hint), or beside the groups, to
    # prompts of their own (stream)
    expert_strategy: str = "none"  # none | random | hint | stream
    expert_share: float = 1.0  # of the step's prompts, drawn at random; stream: of the step's samples
    num_expert_samples: int = 1  # of a group; with expert_gate on top of it; hint: -1 for all
    expert_tasks: dict[str, float] = field(default_factory=dict)  # stream: shares of tasks; empty: those of the run
    hint_low: float = 0.0  # bounds of the share of an answer that a hint is
    hint_high: float = 1.0
    hint_schedule: str = "constant"  # of the upper bound: constant | linear, cosine: to hint_low; then no hints
    hint_steps: int = 0  # that it takes
    hint_draw: str = "uniform"  # between the bounds | fixed: the upper | binomial: so many of hint_segments
    hint_segments: int = 0  # a hint ends with one of so many pieces of an answer (lines, else sentences or words)
    hint_shared: bool = False  # samples of a group have the same hint
    expert_weights: str = "joint"  # loss_weights over all actions | separate: over own and expert actions, then added
    expert_gate: int = -1  # groups with at most so many right answers learn from their expert alone (HPT); -1: off
    off_policy_reshape: str = "p_div_p"  # of an expert's action of probability p: none | logp | p_logp | square_root |
    on_policy_reshape: str = "none"  # ... pow | p_div_p | reject; of the ratio of an own action: the same but reject
    reshape_weight: float = 0.1  # p_div_p: p / (p + weight); logp, p_logp: the factor of log p
    reshape_exponent: float = 0.5  # pow
    sft_coef: float = 1.0  # ppo_sft
    chord_mu_warmup_steps: int = 200
    chord_mu_decay_steps: int = 400
    chord_mu_peak: float = 0.5
    chord_mu_valley: float = 0.02
    chord_phi: bool = True  # weigh an expert's action of probability p by p (1 - p)

    # penalties
    entropy_coef: float = 0.0
    kl_coef: float = 0.0  # > 0 keeps a reference model on the ranks
    kl_estimator: str = "k3"  # k1 | abs | k2 | k3, with + behind: its value with the gradient of k2
    kl_placement: str = "loss"  # loss | reward
    kl_controller: str = "fixed"  # fixed | adaptive: steers kl_coef to kl_target (KL in the reward)
    kl_target: float = 0.1
    kl_horizon: int = 10000  # samples
    reference_sync_every: int = 0  # steps, after which the reference moves towards the policy; 0: it never does
    reference_sync_mix: float = 0.6  # share of the policy in it then (TR-DPO); 1: it becomes the policy

    # the engine's log-probs are not quite the trainer's (megarl.algorithms.corrections)
    rollout_correction: str = "none"  # none | truncate (TIS) | mask (MIS, IcePop) | reject (drop, but do not weigh)
    rollout_correction_level: str = "token"  # ratio of a token | sequence: their product | geometric: their mean
    rollout_correction_low: float = 0.0
    rollout_correction_high: float = 2.0
    bypass_old_logprobs: bool = False  # the engine's log-probs are the old policy's; saves a pass

    def __post_init__(self) -> None:
        def check(name: str, *choices: str) -> None:
            check_choice(f"algorithm.{name}", getattr(self, name), choices)

        check("std", "group", "step", "none")
        check("gpg_scale", "informative", "nonzero")
        check("expert_strategy", "none", "random", "hint", "stream")
        check("hint_schedule", "constant", "linear", "cosine")
        check("hint_draw", "uniform", "fixed", "binomial")
        check("expert_weights", "joint", "separate")
        reshapes = ("none", "logp", "p_logp", "square_root", "pow", "p_div_p")
        check("off_policy_reshape", *reshapes, "reject")
        check("on_policy_reshape", *reshapes)
        check("kl_placement", "loss", "reward")
        check("kl_controller", "fixed", "adaptive")
        check("rollout_correction", "none", "truncate", "mask", "reject")
        check("rollout_correction_level", "token", "sequence", "geometric")
        _check_positive("algorithm", self, "num_minibatches", "num_epochs", "std_epsilon", "rollout_correction_high")
        _check_positive("algorithm", self, "sapo_tau_positive", "sapo_tau_negative", "kl_target", "kl_horizon")
        _check_not_negative("algorithm", self, "kl_coef", "clip_ratio_dual", "rollout_correction_low", "sft_coef")
        _check_not_negative("algorithm", self, "overlong_penalty", "reshape_weight", "reshape_exponent", "kl_cov_coef")
        _check_not_negative("algorithm", self, "chord_mu_warmup_steps", "chord_mu_decay_steps", "filter_max_rounds")
        _check_not_negative("algorithm", self, "reference_sync_every", "hint_steps", "hint_segments")
        bounded = ("gamma", "lam", "overlong_buffer", "chord_mu_peak", "chord_mu_valley", "reference_sync_mix")
        for name in (*bounded, "expert_share", "hint_low", "hint_high"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("clip_cov_ratio", "kl_cov_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must lie in (0, 1]")
        for name in ("clip_ratio_low", "clip_ratio_high", "advantage_clip"):  # may be infinite
            if not getattr(self, name) >= 0:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must not be negative")
        if 0 < self.clip_ratio_dual <= 1:
            raise ValueError(f"algorithm.clip_ratio_dual={self.clip_ratio_dual} must be more than 1, or 0 for none")
        for low in ("filter_low", "clip_cov_low", "rollout_correction_low"):
            high = low.replace("low", "high")
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"algorithm.{low}={getattr(self, low)} must be below {high}={getattr(self, high)}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"algorithm.entropy_coef={self.entropy_coef} must be a number")

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_placement == "reward"

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae" and self.policy_loss != "sft"


@dataclass
class CriticConfig:
    """The model that ``algorithm.advantage=gae`` asks for values.

    What is not here comes from ``optimizer`` and ``model``: with ``model.lora`` it learns adapters of its own.
    """

    path: str = ""  # Hugging Face directory that it starts from, with the policy's tokenizer; empty: model.path
    lr: float = 1e-5
    clip: float = 0.5  # how far a value may move in a step and still count; .inf: any distance
    warmup_steps: int = 0  # first steps, in which the critic learns and the policy waits
    shared_trunk: bool = False  # a head on the policy itself, with its optimizer, instead of a model of its own
    coef: float = 0.1  # of the value loss beside the policy's, with shared_trunk

    def __post_init__(self) -> None:
        _check_not_negative("critic", self, "warmup_steps", "lr")
        _check_positive("critic", self, "coef")
        if not self.clip > 0:
            raise ValueError(f"critic.clip={self.clip} must be positive, .inf for none")
        own = CriticConfig.__dataclass_fields__
        wrong = ("path", "lr", "warmup_steps") if self.shared_trunk else ("coef",)
        for name in wrong:
            if getattr(self, name) != own[name].default:
                raise ValueError(
                    f"critic.{name}={getattr(self, name)} does nothing with critic.shared_trunk={self.shared_trunk}"
                )


@dataclass
class TrainerConfig:
    run_dir: str = "runs/run"
    num_steps: int = 100
    num_epochs: float = (
        0.0  # instead of num_steps: passes over the training rows, over-long ones included; 0: num_steps
    )
    num_nodes: int = 1
    ranks_per_node: int = 0  # 0: as many as the model-parallel sizes need
    max_tokens_per_microbatch: int = 8192  # of a data-parallel rank: context-parallel ranks share them
    max_patches_per_microbatch: int = 65536
    share_prompts: bool = False  # compute a prompt once for all of its samples in a microbatch (sdpa attention)
    # moved to host memory while engines generate: of optimizer | gradients | parameters
    offload: list[str] = field(default_factory=list)
    # optimizer steps by which the weights that sample may be older than those that learn: engines generate the next
    # steps while the ranks train; 0: they take turns
    max_staleness: int = 0
    resume: str = "auto"  # auto: the newest complete checkpoint of run_dir | never | a checkpoint's path
    eval_every: int = 0  # steps; 0: only before the first and after the last
    eval_prompts: int = 256  # of each task
    ema_decay: float = 0.0  # of a float32 average over the policy's optimizer steps, exported as hf_ema/; 0: none

    def __post_init__(self) -> None:
        _check_positive("trainer", self, "num_nodes", "max_tokens_per_microbatch", "max_patches_per_microbatch")
        for part in self.offload:
            check_choice("trainer.offload", part, ["optimizer", "gradients", "parameters"])
        _check_not_negative(
            "trainer", self, "num_steps", "ranks_per_node", "eval_every", "eval_prompts", "max_staleness"
        )
        if self.max_staleness and self.offload:
            raise ValueError(
                f"trainer.offload={list(self.offload)} makes room while the ranks wait for the engines; with "
                f"trainer.max_staleness={self.max_staleness} they do not wait"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay={self.ema_decay} must lie in [0, 1)")
        _check_not_negative("trainer", self, "num_epochs")


@dataclass
class CheckpointConfig:
    save_every: int = 0  # steps; 0: only after the last
    keep: int = 2  # newest checkpoints that stay; 0: all
    async_save: bool = True
    export_hf: bool = False  # write a Hugging Face directory beside the last checkpoint

    def __post_init__(self) -> None:
        _check_not_negative("checkpoint", self, "save_every", "keep")


@dataclass
class ObservabilityConfig:
    trackers: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])  # and wandb
    project: str = "megarl"
    save_rollouts_every: int = 1  # steps; 0: never
    rollout_groups_saved: int = 4  # of a step
    console: bool = True

    def __post_init__(self) -> None:
        for tracker in self.trackers:
            check_choice("observability.trackers", tracker, ["jsonl", "tensorboard", "wandb"])
        _check_not_negative("observability", self, "save_rollouts_every", "rollout_groups_saved")


@dataclass
class DebugConfig:
    deterministic: bool = False  # the same run gives the same bits: seeds per sample, fixed batches, one thread
    logprob_diff_alarm: float = 0.0  # stop when mean |rollout - trainer| log-prob exceeds this; 0: warn at 0.05


@dataclass
class RunConfig:
    name: str = "run"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed={self.seed} must lie in [0, 2^31)")
        lora = self.model.lora
        if self.weight_sync.lora == "adapter" and (not lora.rank or lora.parts != ["decoder"]):
            raise ValueError(
                "weight_sync.lora=adapter needs model.lora.rank > 0 and model.lora.parts=[decoder], where SGLang has "
                f"adapters, not {lora.rank} and {lora.parts}; weight_sync.lora=merged serves all"
            )
        implementation, backend = self.model.transformer_impl, self.model.attention_backend
        if self.trainer.share_prompts and (implementation != "local" or backend == "varlen"):
            raise ValueError(
                f"trainer.share_prompts=True needs sdpa or flex attention, not model.attention_backend={backend} "
                f"with model.transformer_impl={implementation}"
            )
        if self.parallel.context_parallel_size > 1:
            if self.trainer.share_prompts:
                raise ValueError("trainer.share_prompts=True and parallel.context_parallel_size > 1 exclude each other")
            if implementation == "transformer_engine" and self.parallel.cp_comm_type == "all_gather":
                raise ValueError(
                    "parallel.cp_comm_type=all_gather: Transformer Engine takes no packed sequences with it; "
                    "use p2p or a2a, or model.transformer_impl=local"
                )
            exchanges = {"varlen": ("all_gather", "a2a"), "flex": ("a2a",)}.get(backend, CP_COMM_TYPES)
            if self.parallel.cp_comm_type not in ("auto", *exchanges):
                raise ValueError(
                    f"parallel.cp_comm_type={self.parallel.cp_comm_type}: model.attention_backend={backend} works with "
                    f"{' or '.join(exchanges)}"
                )
        try:
            self.parallel.check_world(self.world_size)
        except ValueError as error:
            raise ValueError(f"trainer.num_nodes x trainer.ranks_per_node: {error}") from error

    @property
    def partial_rollouts(self) -> bool:
        """Whether new weights reach an engine amid its responses, which go on with them.

        Reproducible batches and SGLang's adapters cannot change on the way: their responses are finished first.
        """
        possible = not self.debug.deterministic and self.weight_sync.lora == "merged"
        return self.trainer.max_staleness > 0 and self.rollout.partial and possible

    @property
    def has_critic(self) -> bool:
        return self.algorithm.has_critic

    @property
    def estimates(self) -> tuple[str, ...]:
        """The streams of actions that are asked of the ranks before a step is packed."""
        given = self.algorithm.kl_in_reward and not self.algorithm.bypass_old_logprobs
        return (("old_logprobs",) if given else ()) + (("values", "returns") if self.has_critic else ())

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return self.trainer.num_nodes * (self.trainer.ranks_per_node or self.parallel.smallest_world)

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.parallel.model_parallel_size

    def data_parallel_rank(self, rank: int) -> int:
        """Which of the data-parallel ranks a rank of the trainer belongs to: tensor first, then context, then data."""
        shared = self.parallel.tensor_model_parallel_size * self.parallel.context_parallel_size
        return rank // shared % self.data_parallel_size
