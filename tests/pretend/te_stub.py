"""A stand-in for Transformer Engine 2.11 in plain torch, to run the Transformer-Engine layer specs without it.

Constructors and forwards bind the parameters that TE 2.11's source has (``te_2_11_signatures.json``, read from its tag
v2.11), so a keyword that it does not know is a TypeError; attention asserts what ``DotProductAttention.forward``
asserts. Megatron-Core's own wrappers run on top. One tensor-parallel rank. ``install()`` before megatron is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

VERSION = "2.11.0"
CALLS: list[tuple[str, tuple[int, ...]]] = []  # of attention: the mask's type and the query's shape


def _signatures() -> dict[str, inspect.Signature]:
    found = {}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    file = Path(__file__).parent / "te_2_11_signatures.json"
    for name, described in json.loads(file.read_text()).items():
        parameters = [inspect.Parameter(n, kind) for n in described["required"]]
        parameters += [inspect.Parameter(n, kind, default=None) for n in described["optional"]]
        if described["kwargs"]:
            parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        found[name] = inspect.Signature(parameters)
    return found


_SIGNATURES = _signatures()


def _bind(method: str, args: tuple, kwargs: dict[str, Any]) -> types.SimpleNamespace:
    """The arguments by name, None where they are left out; TypeError where TE 2.11 has no such parameter."""
    try:
        bound = _SIGNATURES[method].bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Transformer Engine {VERSION}: {method}: {error}") from None
    bound.apply_defaults()
    return types.SimpleNamespace(**bound.arguments)


class _Module(nn.Module):
    """What Megatron-Core asks of every module of TE's."""

    def set_tensor_parallel_group(self, group: Any) -> None: ...

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


class Linear(_Module):
    """``transformer_engine.pytorch.Linear``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._begin(_bind("Linear.__init__", args, kwargs))

    def _begin(self, a: types.SimpleNamespace) -> None:
        assert (a.tp_size or 1) == 1
        self.parallel_mode, self.tp_size, self.sequence_parallel = a.parallel_mode, 1, a.sequence_parallel
        self.returns_bias, self.adds_bias = a.return_bias, a.bias and not a.return_bias
        where = {"dtype": a.params_dtype or torch.get_default_dtype(), "device": a.device or "cuda"}
        self.weight = nn.Parameter(torch.empty(a.out_features, a.in_features, **where))
        if a.init_method:
            a.init_method(self.weight)
        if a.bias:
            self.bias = nn.Parameter(torch.zeros(a.out_features, **where))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._multiply(_bind("Linear.forward", args, kwargs).inp)

    def _multiply(self, x: Tensor) -> Any:
        x = F.linear(x, self.weight, self.bias if self.adds_bias else None)
        return (x, self.bias) if self.returns_bias else x


class LayerNormLinear(Linear):
    """``transformer_engine.pytorch.LayerNormLinear``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _Module.__init__(self)
        a = _bind("LayerNormLinear.__init__", args, kwargs)
        self.kind, self.eps, self.return_layernorm_output = a.normalization, a.eps, a.return_layernorm_output
        where = {"dtype": a.params_dtype or torch.get_default_dtype(), "device": a.device or "cuda"}
        self.layer_norm_weight = nn.Parameter(torch.ones(a.in_features, **where))
        bias = nn.Parameter(torch.zeros(a.in_features, **where)) if self.kind == "LayerNorm" else None
        self.layer_norm_bias = bias
        self._begin(a)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _bind("LayerNormLinear.forward", args, kwargs).inp
        return self._multiply(_normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.kind, self.eps))


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    if kind == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class RMSNorm(_Module):
    """``transformer_engine.pytorch.RMSNorm``."""

    kind = "RMSNorm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        a = _bind(f"{self.kind}.__init__", args, kwargs)
        where = {"dtype": a.params_dtype or torch.get_default_dtype(), "device": "cuda"}
        size = a.hidden_size or a.normalized_shape
        self.weight = nn.Parameter(torch.ones(size, **where))
        self.bias = nn.Parameter(torch.zeros(size, **where)) if self.kind == "LayerNorm" else None
        self.weight.sequence_parallel = a.sequence_parallel
        self.eps = a.eps if a.eps is not None else 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x, self.weight, self.bias, self.kind, self.eps)


class LayerNorm(RMSNorm):
    """``transformer_engine.pytorch.LayerNorm``."""

    kind = "LayerNorm"


class DotProductAttention(_Module):
    """``transformer_engine.pytorch.DotProductAttention``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        a = _bind("DotProductAttention.__init__", args, kwargs)
        size = a.tp_size or 1
        self.heads, self.groups = a.num_attention_heads // size, (a.num_gqa_groups or a.num_attention_heads) // size
        self.channels, self.scale = a.kv_channels, a.softmax_scale
        self.qkv_format, self.attn_mask_type = a.qkv_format, a.attn_mask_type
        self.register_load_state_dict_post_hook(_without_extra_state)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        f = _bind("DotProductAttention.forward", args, kwargs)
        f.qkv_format, f.attn_mask_type = f.qkv_format or self.qkv_format, f.attn_mask_type or self.attn_mask_type
        self._check(f)
        CALLS.append((f.attn_mask_type, tuple(f.query_layer.shape)))
        output = varlen_attn(
            f.query_layer,
            f.key_layer,
            f.value_layer,
            f.cu_seqlens_q,
            f.cu_seqlens_kv,
            f.max_seqlen_q,
            f.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0) if "causal" in f.attn_mask_type else (-1, -1),
            enable_gqa=True,
        )
        return output.flatten(1)

    def _check(self, f: types.SimpleNamespace) -> None:
        """What TE 2.11 asserts, dot_product_attention.py:1050-1130."""
        q, k, v = f.query_layer, f.key_layer, f.value_layer
        assert q.is_cuda and k.is_cuda and v.is_cuda, "DotProductAttention only supports CUDA tensors"  # noqa: PT018
        assert q.shape[-2:] == (self.heads, self.channels), (q.shape, self.heads, self.channels)
        assert k.shape[-2:] == (self.groups, self.channels), (k.shape, self.groups, self.channels)
        assert f.qkv_format == "thd", f.qkv_format
        assert q.dim() == k.dim() == v.dim() == 3
        assert "padding" in f.attn_mask_type, f.attn_mask_type
        assert f.cu_seqlens_q.shape == f.cu_seqlens_kv.shape
        assert f.cu_seqlens_q.dtype == f.cu_seqlens_kv.dtype == torch.int32
        assert f.cu_seqlens_q.is_cuda
        assert f.attention_mask is None
        assert f.core_attention_bias is None


def _without_extra_state(module: nn.Module, incompatible: Any) -> None:
    """Megatron-Core saves no extra state of attention, and TE's own hook lets it be missing."""
    for key in [key for key in incompatible.missing_keys if "core_attention._extra_state" in key]:
        incompatible.missing_keys.remove(key)


class _Stub(types.ModuleType):
    """A module that has every class Megatron-Core mentions, so that its imports succeed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _ABSENT:
            raise AttributeError(name)
        value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, value)
        return value


_ABSENT = {"apply_fused_qkv_rotary_pos_emb"}


def _optimizers(module: types.ModuleType) -> None:
    # here, not above: what is replaced must be in place before megatron is imported
    from megatron.core import utils

    from tests.pretend.te_adam import fused_adam

    module.FusedAdam = fused_adam(_bind, _SIGNATURES["FusedAdam.__init__"])
    module.multi_tensor_applier = utils.local_multi_tensor_applier
    module.multi_tensor_l2norm = utils.local_multi_tensor_l2_norm
    module.multi_tensor_scale = utils.local_multi_tensor_scale


def _package(module: types.ModuleType) -> None:
    module.__version__ = VERSION
    for name in ("pytorch", "common.recipe", "pytorch.distributed", "pytorch.ops"):
        importlib.import_module(f"{module.__name__}.{name}")


def _pytorch(module: types.ModuleType) -> None:
    for cls in (Linear, LayerNormLinear, DotProductAttention, RMSNorm, LayerNorm):
        setattr(module, cls.__name__, cls)


def _attention(module: types.ModuleType) -> None:
    split = staticmethod(lambda x, dim, sizes: x.split(sizes, dim=dim))
    module._SplitAlongDim = type("_SplitAlongDim", (), {"apply": split})


def _offload(module: types.ModuleType) -> None:
    module.get_cpu_offload_context = lambda *args, **kwargs: (contextlib.nullcontext(), lambda x: x)


def _base(module: types.ModuleType) -> None:
    module.TransformerEngineBaseModule = nn.Module


def _fp8(module: types.ModuleType) -> None:
    module.fp8_autocast = lambda *args, **kwargs: contextlib.nullcontext()
    off = staticmethod(lambda: False)
    module.FP8GlobalStateManager = type("FP8GlobalStateManager", (), {"is_fp8_enabled": off})


_CONTENTS: dict[str, Callable[[types.ModuleType], None]] = {
    "transformer_engine": _package,
    "transformer_engine.pytorch": _pytorch,
    "transformer_engine.pytorch.attention": _attention,
    "transformer_engine.pytorch.cpu_offload": _offload,
    "transformer_engine.pytorch.fp8": _fp8,
    "transformer_engine.pytorch.module.base": _base,
    "transformer_engine.pytorch.optimizers": _optimizers,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        if module.__name__ in _CONTENTS:
            _CONTENTS[module.__name__](module)


def install() -> None:
    """From here on ``import transformer_engine`` gives this one."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("tests.pretend.te_stub.install() must run before megatron is imported")
    sys.meta_path.insert(0, _Finder())
