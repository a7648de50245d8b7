"""The run as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from megarl.config.algorithm import AlgorithmConfig, CriticConfig
from megarl.config.model import CP_COMM_TYPES, ModelConfig, OptimizerConfig, ParallelConfig
from megarl.config.rollout import ENGINE_MEMORY, DataConfig, RewardConfig, RolloutConfig, TaskConfig, WeightSyncConfig
from megarl.utils.checks import check_choice, check_not_negative, check_positive

TRAINER_MEMORY = ("optimizer", "gradients", "parameters", "reference")


@dataclass
class TrainerConfig:
    run_dir: str = "runs/run"
    num_steps: int = 100
    num_epochs: float = 0.0  # instead of num_steps: passes over the rows, over-long ones included; 0: num_steps
    num_nodes: int = 1
    ranks_per_node: int = 0  # 0: on GPUs as many as trainer.placement allows, on a CPU as the parallel sizes need
    # colocated: ranks and engines take turns with the same GPUs | split: each has its own | auto: by the cluster's GPUs
    placement: str = "auto"
    max_tokens_per_microbatch: int = 8192  # of a data-parallel rank: context-parallel ranks share them
    max_patches_per_microbatch: int = 65536
    share_prompts: bool = False  # compute a prompt once for all of its samples in a microbatch (sdpa attention)
    # what the ranks give to colocated engines while those generate: of optimizer | gradients | parameters | reference;
    # auto: all on GPUs that they share, nothing elsewhere. CUDA contexts and NCCL's buffers stay
    offload: list[str] = field(default_factory=lambda: ["auto"])
    # steps (of algorithm.num_minibatches optimizer steps each) by which the weights that sample may be older than those
    # that learn: engines generate the next steps while the ranks train; 0: they take turns
    max_staleness: int = 0
    resume: str = "auto"  # auto: the newest complete checkpoint of run_dir | never | a checkpoint's path
    eval_every: int = 0  # steps; 0: only before the first and after the last
    eval_prompts: int = 256  # of each task
    ema_decay: float = 0.0  # of a float32 average over the policy's optimizer steps, exported as hf_ema/; 0: none

    def __post_init__(self) -> None:
        check_positive("trainer", self, "num_nodes", "max_tokens_per_microbatch", "max_patches_per_microbatch")
        check_choice("trainer.placement", self.placement, ["auto", "colocated", "split"])
        for part in self.offload:
            check_choice("trainer.offload", part, ["auto", *TRAINER_MEMORY])
        if "auto" in self.offload and len(self.offload) > 1:
            raise ValueError(f"trainer.offload={list(self.offload)}: auto stands alone")
        check_not_negative(
            "trainer", self, "num_steps", "ranks_per_node", "eval_every", "eval_prompts", "max_staleness"
        )
        if self.max_staleness and self.placement == "colocated":
            raise ValueError(
                f"trainer.placement=colocated takes turns; with trainer.max_staleness={self.max_staleness} ranks and "
                "engines work at the same time: trainer.placement=split"
            )
        if self.max_staleness and self.offload not in ([], ["auto"]):
            raise ValueError(
                f"trainer.offload={list(self.offload)} makes room while the ranks wait for the engines; with "
                f"trainer.max_staleness={self.max_staleness} they do not wait"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay={self.ema_decay} must lie in [0, 1)")
        check_not_negative("trainer", self, "num_epochs")

    @property
    def offloaded(self) -> list[str]:
        """``offload``, nothing as long as nobody has decided what auto means."""
        return [part for part in self.offload if part != "auto"]


@dataclass
class CheckpointConfig:
    save_every: int = 0  # steps; 0: only after the last
    keep: int = 2  # newest checkpoints that stay; 0: all
    async_save: bool = True
    export_hf: bool = False  # write a Hugging Face directory beside the last checkpoint

    def __post_init__(self) -> None:
        check_not_negative("checkpoint", self, "save_every", "keep")


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
        check_not_negative("observability", self, "save_rollouts_every", "rollout_groups_saved")


@dataclass
class DebugConfig:
    deterministic: bool = False  # the same run gives the same bits: seeds per sample, fixed batches, one thread
    # end a run whose rollouts the trainer finds this different: float32 by the largest |difference of log-probs|,
    # bfloat16 by the mean |difference of probabilities|; 0: warn once, where the canary of a weight sync would fail
    logprob_diff_alarm: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative("debug", self, "logprob_diff_alarm")


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
        for name, task in self.tasks.items():
            check_not_negative(f"tasks.{name}", task, "weight")
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
        if self.trainer.placement == "split" and self.rollout.release not in ([], ["auto"]):
            raise ValueError(
                f"rollout.release={list(self.rollout.release)}: engines lend memory with trainer.placement=colocated; "
                "with trainer.placement=split they keep all of it"
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
    def released(self) -> list[str]:
        """The kinds of memory that engines lend to the ranks."""
        if self.trainer.placement != "colocated":
            return []
        return list(ENGINE_MEMORY if self.rollout.release == ["auto"] else self.rollout.release)

    @property
    def has_critic(self) -> bool:
        return self.algorithm.has_critic

    @property
    def collective_timeout_s(self) -> float:
        """Longer than a rank waits for an engine: the others wait for that rank in a collective meanwhile."""
        return max(3600.0, 2 * self.rollout.timeout_s)

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

    def decodes_images(self, rank: int) -> bool:
        """Whether a rank of the trainer decodes images: one of each tensor-parallel group of the first stage does."""
        first_stage = self.world_size // self.parallel.pipeline_model_parallel_size
        return rank < first_stage and rank % self.parallel.tensor_model_parallel_size == 0
