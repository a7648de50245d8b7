"""The contract of a model family: everything that is known of it, in one object.

The object is plain data and names what it does not hold, so that an engine's process and a driver can read it without
importing Megatron. ``docs/models.md`` says how a family is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megarl.families.sizes import VisionSizes
from megarl.registry import load_object

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Traits:
    """What the ``model_type`` of a decoder says and no number does."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head
    experts: bool = False  # in the place of the MLP of some layers
    expert_files: bool = False  # the files hold every expert's matrices by themselves
    reads_norm_topk_prob: bool = False  # else the chosen experts' probabilities sum to one whatever it says
    fused: bool = False  # the files hold queries, keys and values as one matrix, and gate and up as another
    partial_rotary: bool = False  # ``partial_rotary_factor`` is read: the first channels of a head are turned
    interleaved_axes: bool = False  # channels are turned by time, height and width in turns, not in sections


@dataclass(frozen=True)
class Architecture:
    """One class of transformers', as ``architectures`` of config.json names it."""

    processor: str  # "module:class" of data.processors
    engine_model: bool = False  # rollout.external_models has it, because SGLang has not or computes otherwise
    engine_processor: bool = False  # so has rollout.external_processors
    engine_prefixes: Mapping[str, str] = field(default_factory=dict)  # how SGLang's parameters begin -> the files'


@dataclass(frozen=True)
class Family:
    """Models that share their code.

    ``package`` has the modules ``config`` (``validate``), ``model`` (``build``), ``mapping`` (``mappings``) and
    ``probe`` (``probe``). ``names`` and ``layouts``: functions, as "module:function", for files that another version of
    transformers has written in other names or layouts than the published ones; empty: there are none.
    """

    name: str
    package: str
    architectures: Mapping[str, Architecture]
    decoders: Mapping[str, Traits] = field(default_factory=dict)  # by model_type; the other families' may be used too
    names: str = ""
    layouts: str = ""
    output_matrix: str = "lm_head.weight"  # what files call it; of tied models it may be stored beside the embedding
    vision_sizes: Callable[[PretrainedConfig], VisionSizes] | None = None  # None: the models see nothing
    weights_folder: str = ""  # where in a model directory the files of the trained model lie
    config_class: str = "transformers:AutoConfig"

    def validate(self, hf_config: PretrainedConfig, parallel: Any) -> None:
        """Raise ``ValueError`` that names the key when ``parallel`` cannot divide the model or a field is unknown."""
        load_object(f"{self.package}.config:validate")(hf_config, parallel)

    def build(self, hf_config: PretrainedConfig, model: Any, parallel: Any, **stage: Any) -> Any:
        """A piece of the model, a ``models.common.LanguageModel``; ``stage``: pre_process, post_process, vp_stage."""
        return load_object(f"{self.package}.model:build")(hf_config, model, parallel, **stage)

    def mappings(self, hf_config: PretrainedConfig) -> list[Any]:
        """One ``models.mapping.Mapping`` for each parameter of the unsplit model."""
        return load_object(f"{self.package}.mapping:mappings")(hf_config)

    def probe(self, hf_config: PretrainedConfig) -> Any:
        """The prompt (``models.probe.Probe``) whose logits a converter compares with transformers'."""
        return load_object(f"{self.package}.probe:probe")(hf_config)

    def canonical_name(self, name: str) -> str:
        """The published spelling of a tensor's name, whichever version of transformers wrote the file."""
        return load_object(self.names)(name) if self.names else name

    def canonical_tensor(self, config: dict[str, Any], name: str, tensor: Tensor) -> Tensor:
        """The tensor of a canonical ``name`` in its published layout; ``config``: that of config.json."""
        return load_object(self.layouts)(config, name, tensor) if self.layouts else tensor

    def read_config(self, directory: str) -> PretrainedConfig:
        """The configuration of the model in ``directory``."""
        return load_object(self.config_class).from_pretrained(directory, trust_remote_code=False)
