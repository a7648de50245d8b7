"""How much memory of a GPU a rank of the trainer takes, and what is left for an engine: arithmetic on configurations.

Bytes follow what the code allocates (``tests/pretend`` runs it on shapes, and the two agree within 5 %). Vectors, norms
and biases among the parameters, are left out. What nothing here can know, CUDA's contexts and NCCL's buffers, is a
reserve. Nothing here imports torch: it answers before anything is started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from megarl.config import RunConfig
from megarl.families import family_of
from megarl.families.sizes import Block, VisionSizes

MIB = 1 << 20
USABLE = 0.9  # of a GPU's memory: the caching allocator's fragments need the rest
RANK_RESERVE = 2_000_000_000  # CUDA's context, NCCL's buffers and cuBLAS's workspaces of a rank, which nothing moves
ENGINE_RESERVE = 2_500_000_000  # the same of a colocated engine, with the memory that its saver does not manage
HEAD_ROWS, HEAD_BYTES = 2048, 512 * MIB  # of logits at once, at most: kernels.logprob

# activations that the trainer may drop, from the fastest to the smallest: (model.recompute, model.recompute_modules)
RECOMPUTE = (("none", ["core_attn"]), ("selective", ["core_attn", "layernorm", "mlp"]), ("full", ["core_attn"]))

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}  # of an optimizer's state

# what `trainer.offload` calls a part that it moves
_MOVED = {
    "parameters": "parameters",
    "gradients": "gradients",
    "main parameters": "optimizer",
    "optimizer": "optimizer",
    "reference": "reference",
}


@dataclass(frozen=True)
class Activations:
    """Numbers of one layer, for its backward pass."""

    input: int  # what it begins with
    residual: int  # what stands between attention and MLP
    norms: int
    attention: int  # queries, keys and values before and after rotation, and their outputs
    mlp: int
    gradients: int  # that the backward pass holds at once

    def kept(self, recompute: str, modules: list[str]) -> int:
        """What stays until the backward pass."""
        if recompute == "full":
            return self.input
        dropped = modules if recompute == "selective" else []
        norms, mlp = self.norms * ("layernorm" not in dropped), self.mlp * ("mlp" not in dropped)
        return self.input + self.residual + self.attention + norms + mlp

    def passing(self, recompute: str, modules: list[str]) -> int:
        """What comes and goes with each layer of the backward pass."""
        everything = self.kept("none", [])
        return everything - self.kept(recompute, modules) + self.gradients


@dataclass(frozen=True)
class Sizes:
    """A model, by what of it takes memory."""

    decoder: Block
    vocabulary: int
    tied: bool
    vision: VisionSizes | None = None


def sizes(hf_config: PretrainedConfig) -> Sizes:
    """What ``hf_config`` says of a model of one of megarl's families."""
    text = hf_config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = getattr(text, "num_experts", 0) or 0
    dense_only = set(getattr(text, "mlp_only_layers", None) or [])
    step = getattr(text, "decoder_sparse_step", 1) or 1
    sparse = [i for i in range(text.num_hidden_layers) if experts and i not in dense_only and (i + 1) % step == 0]
    decoder = Block(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head,
        key=text.num_key_value_heads * head,
        ffn=text.intermediate_size,
        gated=True,
        sparse=len(sparse),
        experts=experts,
        expert_ffn=text.moe_intermediate_size if experts else 0,
        chosen=text.num_experts_per_tok if experts else 0,
        groups=text.num_key_value_heads,
    )
    vision_sizes = family_of(hf_config).vision_sizes
    vision = None if vision_sizes is None else vision_sizes(hf_config)
    return Sizes(decoder, text.vocab_size, bool(hf_config.tie_word_embeddings), vision)


@dataclass
class Usage:
    """Bytes of one rank, the worst of all pipeline stages, by what they are for."""

    training: dict[str, int]  # at the peak of a forward and backward pass
    sending: dict[str, int]  # while engines get weights; colocated ones have room for these then
    saving: dict[str, int]  # a checkpoint between two steps, while colocated engines keep their weights

    @property
    def phase(self) -> dict[str, int]:
        """The parts of the phase that needs most."""
        return max(self.training, self.sending, self.saving, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """The most bytes that are needed at once."""
        return sum(self.phase.values())


def usage(config: RunConfig, hf_config: PretrainedConfig) -> Usage:
    """Of a rank on GPUs; nothing in ``config`` is left to the device any more."""
    model = sizes(hf_config)
    stages = range(config.parallel.pipeline_model_parallel_size)
    return max((_stage(config, model, stage) for stage in stages), key=lambda found: found.peak)


def _stage(config: RunConfig, model: Sizes, stage: int) -> Usage:
    static, colocated = _static(config, model, stage), config.trainer.placement == "colocated"
    reserve = {"CUDA and NCCL": RANK_RESERVE} | ({"engine, always": ENGINE_RESERVE} if colocated else {})
    away = set(config.trainer.offload) - {"parameters"} if colocated else set()
    kept = {part: size for part, size in static.items() if _MOVED.get(part) not in away}
    bucket = max(config.weight_sync.bucket_bytes, _engine_width(config) * model.vocabulary * model.decoder.hidden)
    sending = {"buckets": round(2.25 * bucket)}  # shards, gathered ones and whole tensors
    saving = {part: size for part, size in static.items() if part != "gradients"}
    if colocated:
        sending["engine, weights"] = saving["engine, weights"] = engine_weights(config, model)
    return Usage(static | _passing(config, model, stage) | reserve, kept | sending | reserve, saving | reserve)


def _width(config: RunConfig) -> int:
    """Bytes of a parameter, and of an activation."""
    return 2 if config.model.params_dtype == "bfloat16" else 4


def _engine_width(config: RunConfig) -> int:
    return 2 if (config.rollout.dtype or config.model.params_dtype) == "bfloat16" else 4


def _layers(config: RunConfig, model: Sizes, stage: int) -> int:
    """Layers of the decoder on a pipeline stage."""
    layout, size = config.parallel.pipeline_layout, config.parallel.pipeline_model_parallel_size
    return sum(layout[stage::size]) if layout else math.ceil(model.decoder.layers / size)


def _parameters(config: RunConfig, model: Sizes, stage: int) -> dict[str, tuple[int, int]]:
    """Numbers that a rank of ``stage`` holds of each part: (shared by tensor-parallel ranks, of experts)."""
    parallel, decoder, vision = config.parallel, model.decoder, model.vision
    tensor, first, last = parallel.tensor_model_parallel_size, stage == 0, stage == _last_stage(config)
    layers = _layers(config, model, stage)
    sparse = decoder.sparse * layers // decoder.layers
    dense = layers * decoder.attention + (layers - sparse) * decoder.mlp
    dense += model.vocabulary * decoder.hidden * (first + (last and not (model.tied and first)))
    experts = sparse * decoder.experts * decoder.expert // parallel.expert_model_parallel_size
    parts = {"decoder": (dense // tensor, experts)}
    if first and vision is not None:
        tower = vision.in_layers // tensor + vision.other
        parts |= {"vision_tower": (tower, 0), "projector": (vision.projector // tensor, 0)}
    return parts


def _last_stage(config: RunConfig) -> int:
    return config.parallel.pipeline_model_parallel_size - 1


def _static(config: RunConfig, model: Sizes, stage: int) -> dict[str, int]:
    """What a rank holds between passes."""
    width, parallel, lora = _width(config), config.parallel, config.model.lora
    parts = _parameters(config, model, stage)
    held = sum(shared + experts for shared, experts in parts.values())
    trained = [numbers for part, numbers in parts.items() if part not in config.model.freeze]
    if lora.rank:
        trained = [(_adapters(config, model, stage), 0)]
    shared, experts = (sum(numbers) for numbers in zip(*trained, strict=True)) if trained else (0, 0)
    sharing = config.data_parallel_size * parallel.context_parallel_size
    sharing_experts = max(1, sharing * parallel.tensor_model_parallel_size // parallel.expert_model_parallel_size)
    if not parallel.use_distributed_optimizer:
        sharing = sharing_experts = 1
    owned = shared // sharing + experts // sharing_experts  # whose optimizer state is on this rank
    options = config.optimizer.megatron
    on_host = options.get("optimizer_offload_fraction", 1.0) if options.get("optimizer_cpu_offload") else 0.0
    main = _DTYPE_BYTES[options.get("main_params_dtype", "float32")]
    moments = sum(_DTYPE_BYTES[options.get(name, "float32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    learned = {
        "gradients": 4 * (shared + experts),
        "main parameters": round(main * owned * (1 - on_host)) if width == 2 else 0,
        "optimizer": round(moments * owned * (1 - on_host)),
    }
    result = {"parameters": width * held, **learned}
    supervised = config.algorithm.policy_loss == "sft"
    if config.algorithm.kl_coef > 0 and not lora.rank and not supervised:
        moves = config.algorithm.reference_sync_every > 0  # in float32, beside what the passes read
        result["reference"] = (width + (4 if moves and width == 2 else 0)) * held
    if config.has_critic and not config.critic.shared_trunk:
        result["critic"] = width * held + sum(learned.values())
    if config.trainer.ema_decay:
        result["average"] = 4 * held
    return {part: size for part, size in result.items() if size}


def _adapters(config: RunConfig, model: Sizes, stage: int) -> int:
    """Numbers of a rank's adapters where all linear layers have some, both matrices whole: at most."""
    parts, rank = config.model.lora.parts, config.model.lora.rank

    def of(block: Block, layers: int) -> int:
        return layers * rank * (5 * block.hidden + 2 * block.query + 2 * block.key + 3 * block.ffn)

    vision = model.vision if stage == 0 and "vision_tower" in parts else None
    decoder = of(model.decoder, _layers(config, model, stage)) if "decoder" in parts else 0
    return decoder + (of(vision.layers, vision.layers.layers) if vision is not None else 0)


def _passing(config: RunConfig, model: Sizes, stage: int) -> dict[str, int]:
    """What a forward and backward pass adds at its peak."""
    parallel, decoder, vision, width = config.parallel, model.decoder, model.vision, _width(config)
    how, modules = config.model.recompute, config.model.recompute_modules
    tensor = parallel.tensor_model_parallel_size
    tokens = config.trainer.max_tokens_per_microbatch // parallel.context_parallel_size
    split = tensor if parallel.sequence_parallel else 1
    layer = _activations(config, decoder, config.model.megatron, tokens, rows=tokens // split)
    kept = layer.kept(how, modules) * _layers_in_flight(config, model, stage)
    kept += 2 * tokens * decoder.hidden  # what comes in before ranks share it, and mcore's buffer where it is gathered
    result = {"activations": width * kept}
    moments = [layer.passing(how, modules)]  # of a pass, of which the worst counts
    head = 0
    if stage == _last_stage(config):
        shard = model.vocabulary // tensor
        head = 2 * width * tokens * decoder.hidden  # hidden states of all ranks' tokens, and of actions
        head += (4 + width % 4) * shard * decoder.hidden  # the output matrix's gradient in float32, and rounded
        head += 2 * min(HEAD_BYTES, 4 * HEAD_ROWS * shard)
    if stage == 0 and vision is not None:
        patches = _patches(config, model)
        tower = vision.layers
        picture = _activations(config, tower, config.model.vision_megatron, patches, rows=patches)
        frozen = {"vision_tower"} <= set(config.model.freeze) or (
            config.model.lora.rank > 0 and not {"vision_tower", "projector"} & set(config.model.lora.parts)
        )
        if not frozen:
            result["activations, vision"] = _flights(config) * width * picture.kept(how, modules) * tower.layers
            # the projector's input, with its norm's, and what stands between its layers
            result["activations, vision"] += _flights(config) * width * 4 * patches * tower.hidden
        moments.append(picture.kept("none", []) if frozen else picture.passing(how, modules))
        # in the tower's dtype, for its gradient; the bytes they are made of are gone before the first layer
        result["pixels"] = (1 if frozen else _flights(config)) * width * patches * vision.patch
    result["largest moment"] = max(head, width * max(moments))
    return result


def _flights(config: RunConfig) -> int:
    """Microbatches that the first pipeline stage holds at once."""
    return config.parallel.pipeline_model_parallel_size


def _layers_in_flight(config: RunConfig, model: Sizes, stage: int) -> int:
    """Decoder layers of a stage, once for each microbatch that is between its two passes."""
    parallel = config.parallel
    size, pieces = parallel.pipeline_model_parallel_size, max(1, parallel.virtual_pipeline_model_parallel_size)
    layers = _layers(config, model, stage)
    if pieces == 1:
        return layers * (size - stage)
    started = 2 * (size - stage - 1) + (pieces - 1) * size + 1  # pieces of microbatches
    return math.ceil(layers * started / pieces)


def _patches(config: RunConfig, model: Sizes) -> int:
    """Patches that a rank may have to encode for a microbatch: one of prompts that are all image."""
    room = round(config.trainer.max_tokens_per_microbatch * model.vision.patches_per_token)
    return min(room, config.trainer.max_patches_per_microbatch)


def _activations(config: RunConfig, block: Block, given: dict[str, Any], tokens: int, *, rows: int) -> Activations:
    """Of a layer on ``tokens``, of which ``rows`` are this rank's between layers; ``given``: fields for mcore."""
    tensor = config.parallel.tensor_model_parallel_size
    ffn = tokens * block.ffn // tensor
    fused = bool(given.get("bias_activation_fusion", True)) and block.gated
    # the first matrix's output, then gate, up and their product; fused only the product
    mlp = (3 * ffn if fused else 5 * ffn) if block.gated else 2 * ffn
    if block.sparse:
        here = rows * block.chosen
        experts = here * (2 * block.hidden + 5 * block.expert_ffn)
        mlp = (mlp * (block.layers - block.sparse) + experts * block.sparse) // block.layers
    attention = tokens * (3 * block.query + 3 * block.key) // tensor
    if 0 < block.groups < tensor:  # mcore gathers queries, keys and values, and the values are a view of all
        attention = tokens * (block.query + 2 * block.key + 2 * block.query // tensor + block.key // block.groups)
    return Activations(
        input=rows * block.hidden,
        residual=rows * block.hidden,
        norms=2 * rows * block.hidden,
        attention=attention,
        mlp=mlp,
        gradients=(3 if block.gated else 2) * ffn + 2 * tokens * block.hidden,
    )


def engine_weights(config: RunConfig, model: Sizes) -> int:
    """Bytes of the weights on each GPU of an engine."""
    decoder, vision = model.decoder, model.vision
    dense = decoder.layers * decoder.attention + (decoder.layers - decoder.sparse) * decoder.mlp
    dense += decoder.sparse * decoder.experts * decoder.expert
    dense += model.vocabulary * decoder.hidden * (1 if model.tied else 2)
    if vision is not None:
        dense += vision.in_layers + vision.other + vision.projector
    return _engine_width(config) * dense // config.rollout.tensor_parallel_size


def fits(config: RunConfig, hf_config: PretrainedConfig, gpu_bytes: int) -> bool:
    """Whether a rank's peak leaves the allocator its part of a GPU of ``gpu_bytes``."""
    return usage(config, hf_config).peak <= USABLE * gpu_bytes


def check_memory(config: RunConfig, hf_config: PretrainedConfig, gpu_bytes: int) -> None:
    """Raise a ``ValueError`` that names the parts and the keys that help when a rank does not fit a GPU."""
    if fits(config, hf_config, gpu_bytes):
        return
    found = usage(config, hf_config)
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in found.phase.items())
    raise ValueError(
        f"a rank needs about {found.peak / 1e9:.1f} GB and may have {USABLE * gpu_bytes / 1e9:.1f} of its GPU's "
        f"{gpu_bytes / 1e9:.1f}: {parts}. {_advice(config, hf_config, gpu_bytes)}"
    )


def _advice(config: RunConfig, hf_config: PretrainedConfig, gpu_bytes: int) -> str:
    """Which single changes would make it fit, else what to change at all."""
    tensor, world = config.parallel.tensor_model_parallel_size, config.world_size
    tokens, found = config.trainer.max_tokens_per_microbatch, []

    def helps(key: str, changed: RunConfig) -> None:
        if fits(changed, hf_config, gpu_bytes):
            found.append(key)

    if config.model.recompute != "full":
        helps("model.recompute=full", replace(config, model=replace(config.model, recompute="full")))
    halved = replace(config.trainer, max_tokens_per_microbatch=tokens // 2)
    helps(f"trainer.max_tokens_per_microbatch={tokens // 2}", replace(config, trainer=halved))
    text = hf_config.get_text_config()
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    size = 2 * tensor
    while size <= 8 and not found:
        if heads % size == 0 and (groups % size == 0 or size % groups == 0):
            nodes, each = config.trainer.num_nodes, max(1, size * max(1, world // size) // config.trainer.num_nodes)
            parallel = replace(config.parallel, tensor_model_parallel_size=size, sequence_parallel=True)
            more = replace(config.trainer, num_nodes=nodes, ranks_per_node=each)
            if nodes * each % (size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size) == 0:
                helps(f"parallel.tensor_model_parallel_size={size}", replace(config, parallel=parallel, trainer=more))
        size *= 2
    if config.trainer.placement == "colocated" and set(_MOVED.values()) - set(config.trainer.offload):
        helps(
            "trainer.offload=[auto]",
            replace(config, trainer=replace(config.trainer, offload=sorted(set(_MOVED.values())))),
        )
    if found:
        return f"It fits with {' or '.join(found)}"
    return (
        "Use more GPUs with parallel.tensor_model_parallel_size, pipeline_model_parallel_size or more data-parallel "
        "ranks (trainer.num_nodes), or model.lora.rank"
    )


def engine_memory_fraction(config: RunConfig, hf_config: PretrainedConfig, gpu_bytes: int) -> float:
    """SGLang's ``mem_fraction_static`` for this run's engines on GPUs of ``gpu_bytes``.

    SGLang 0.5.20 measures the memory that is free when an engine has its process groups and no weights yet
    (``distributed/bootstrap.py``), keeps 1 - fraction of it for what is not weights and not KV cache, and makes the
    cache of the rest that is free once the weights are there (``kv_cache_configurator.py``). So the fraction is of what
    others leave: a colocated engine starts when the ranks have lent ``trainer.offload``, and what they keep is not
    counted again. ``ValueError`` when weights and a cache do not fit.
    """
    model, tensor = sizes(hf_config), config.rollout.tensor_parallel_size
    free = gpu_bytes - ENGINE_RESERVE
    if config.trainer.placement == "colocated":
        free -= RANK_RESERVE + residue(config, hf_config)
    kept = _engine_runtime(gpu_bytes, tensor)
    if model.vision is not None:
        kept += 8192 * MIB  # for its encoder: what SGLang itself takes where it measures the rest
    kept += 2 * max(config.weight_sync.bucket_bytes, _engine_width(config) * model.vocabulary * model.decoder.hidden)
    weights = engine_weights(config, model)
    cache = free - kept - weights
    longest = config.data.max_prompt_length + config.rollout.max_new_tokens
    token = 2 * 2 * model.decoder.layers * max(model.decoder.key // tensor, model.decoder.key // model.decoder.groups)
    if cache < longest * token:
        raise ValueError(
            f"an engine has {free / 1e9:.1f} GB of a GPU, of which its weights need {weights / 1e9:.1f} and what is "
            f"not cache {kept / 1e9:.1f}: {cache / 1e9:.1f} are left for keys and values, and a sequence of {longest} "
            f"tokens has {longest * token / 1e9:.1f}. Use a larger rollout.tensor_parallel_size"
        )
    return math.floor(1000 * (1 - kept / free)) / 1000


def residue(config: RunConfig, hf_config: PretrainedConfig) -> int:
    """Bytes of a rank that stay on its GPU while engines generate, without CUDA's and NCCL's own."""
    model = sizes(hf_config)
    stages = range(config.parallel.pipeline_model_parallel_size)
    away = set(config.trainer.offload)
    return max(
        sum(size for part, size in _static(config, model, stage).items() if _MOVED.get(part) not in away)
        for stage in stages
    )


def _engine_runtime(gpu_bytes: int, tensor: int) -> int:
    """What SGLang keeps for activations and CUDA graphs on such a GPU: its ``arg_groups/memory_hook.py``."""
    small, medium, large = (gpu_bytes < limit * 1024 * MIB for limit in (35, 60, 160))
    prefill = 4096 if medium else 8192 if large else 16384
    batch = (48 if small else 32) if medium else 256 if large else 512
    if tensor >= 4:
        batch = 160 if medium else 512
    reserve = 512 + 1.5 * prefill + tensor * 128 + 2 * batch
    return int(max(reserve, 10 * 1024 if gpu_bytes > 60 * 1024 * MIB else 0)) * MIB
