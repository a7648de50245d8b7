"""The parts that simulated tensor-parallel ranks hold of an SGLang model against the checkpoint's whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megarl.rollout import sglang_process  # noqa: F401 - installs what SGLang needs on a CPU
from megarl.rollout.live_weights import (
    BaseLayerWithLoRA,
    ColumnParallelLinear,
    FusedMoE,
    MergedColumnParallelLinear,
    Phi3ForCausalLM,
    QKVParallelLinear,
    Qwen3MoeForCausalLM,
    RowParallelLinear,
    VocabParallelEmbedding,
    _adapter_of,
    combined,
    held_weights,
)
from megarl.utils.checksum import checksum_part, tensor_checksum

RANKS = 4
KV_PARTS = 2  # key and value heads: each lies on two ranks
HIDDEN = 6


def fake(kind: type[nn.Module], parameters: dict[str, Tensor], **attributes: object) -> nn.Module:
    """A layer of SGLang with these parameters, made without its process groups."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in parameters.items():
        module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def share(tensor: Tensor, rank: int, parts: int = RANKS, dim: int = 0) -> Tensor:
    return tensor.chunk(parts, dim)[rank * parts // RANKS]


def qkv(rank: int, whole: list[Tensor]) -> Tensor:
    query, key, value = whole
    return torch.cat([share(query, rank), share(key, rank, KV_PARTS), share(value, rank, KV_PARTS)])


def qkv_layer(rank: int, parameters: dict[str, Tensor]) -> nn.Module:
    sizes = {"q_proj_shard_size": 2, "kv_proj_shard_size": 3, "v_proj_shard_size": 3}
    return fake(
        QKVParallelLinear, parameters, **sizes, tp_rank=rank, tp_size=RANKS, num_kv_head_replicas=RANKS // KV_PARTS
    )


def tree(modules: dict[str, nn.Module], root: nn.Module | None = None) -> nn.Module:
    root = root or nn.Module()
    for path, module in modules.items():
        *parents, last = path.split(".")
        at = root
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, module)
    return root


def sums(models: list) -> dict[str, str]:
    """What ranks that hold these tell each other."""
    parts = [[int(checksum_part(item.tensor, item.offset, item.strides)) for item in held] for held in models]
    return combined(models[0], [[[item.part for item in held], mine] for held, mine in zip(models, parts, strict=True)])


def attention(fused: bool) -> tuple[dict[str, Tensor], Callable[[int], nn.Module]]:
    weights = [numbers(8, HIDDEN), numbers(6, HIDDEN), numbers(6, HIDDEN)]
    biases, gate, up = [numbers(8), numbers(6), numbers(6)], numbers(12, HIDDEN), numbers(12, HIDDEN)
    out, bias, norm = numbers(HIDDEN, 8), numbers(HIDDEN), numbers(HIDDEN)
    at = "model.layers.0"
    expected = {f"{at}.self_attn.o_proj.weight": out, f"{at}.self_attn.o_proj.bias": bias, f"{at}.norm.weight": norm}
    expected |= {"visual.attn.qkv.weight": torch.cat(weights)}
    if fused:
        expected[f"{at}.self_attn.qkv_proj.weight"] = torch.cat(weights)
        expected[f"{at}.self_attn.qkv_proj.bias"] = torch.cat(biases)
        expected[f"{at}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    else:
        for name, weight, vector in zip("qkv", weights, biases, strict=True):
            expected[f"{at}.self_attn.{name}_proj.weight"] = weight
            expected[f"{at}.self_attn.{name}_proj.bias"] = vector
        expected |= {f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up}

    def model(rank: int) -> nn.Module:
        row = {"weight": share(out, rank, dim=1), "bias": bias}
        halves = {"weight": torch.cat([share(gate, rank), share(up, rank)])}
        return tree(
            {
                f"{at}.self_attn.qkv_proj": qkv_layer(rank, {"weight": qkv(rank, weights), "bias": qkv(rank, biases)}),
                "visual.attn.qkv_proj": qkv_layer(rank, {"weight": qkv(rank, weights)}),
                f"{at}.self_attn.o_proj": fake(RowParallelLinear, row, tp_rank=rank, tp_size=RANKS),
                f"{at}.mlp.gate_up_proj": fake(MergedColumnParallelLinear, halves, tp_rank=rank, tp_size=RANKS),
                f"{at}.norm": fake(nn.Module, {"weight": norm}),
            },
            fake(Phi3ForCausalLM, {}) if fused else None,
        )

    return expected, model


@pytest.mark.parametrize("fused", [False, True])
def test_attention_and_mlp(fused):
    expected, model = attention(fused)
    models = [list(held_weights(model(rank))) for rank in range(RANKS)]
    assert sums(models) == {name: tensor_checksum(tensor) for name, tensor in expected.items()}


def test_a_padded_vocabulary_and_columns():
    """Ten rows padded to sixteen: the third rank holds two of them, the fourth none; a tower that is on every rank."""
    table, head, tower = numbers(10, HIDDEN), numbers(8, HIDDEN), numbers(5, HIDDEN)
    padded = torch.cat([table, numbers(6, HIDDEN)])

    def model(rank: int) -> nn.Module:
        start, stop = min(4 * rank, 10), min(4 * rank + 4, 10)
        indices = SimpleNamespace(org_vocab_start_index=start, num_org_elements=stop - start)
        rows = {"weight": share(padded, rank)}
        return tree(
            {
                "model.embed_tokens": fake(VocabParallelEmbedding, rows, org_vocab_size=10, shard_indices=indices),
                "visual.fc": fake(ColumnParallelLinear, {"weight": share(head, rank)}, tp_rank=rank, tp_size=RANKS),
                "visual.whole": fake(ColumnParallelLinear, {"weight": tower}, tp_rank=0, tp_size=1),
            }
        )

    expected = {"model.embed_tokens.weight": table, "visual.fc.weight": head, "visual.whole.weight": tower}
    models = [list(held_weights(model(rank))) for rank in range(RANKS)]
    assert sums(models) == {name: tensor_checksum(tensor) for name, tensor in expected.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_experts(tp):
    """Four experts over ranks of which ``tp`` share each; SGLang keeps their matrices turned."""
    ep, inner = RANKS // tp, 8
    gate_up, down = numbers(4, HIDDEN, 2 * inner), numbers(4, inner, HIDDEN)

    def model(rank: int) -> nn.Module:
        experts = slice(rank // tp * 4 // ep, (rank // tp + 1) * 4 // ep)
        mine = [half.chunk(tp, dim=2)[rank % tp] for half in gate_up[experts].chunk(2, dim=2)]
        w13 = torch.cat(mine, dim=2).transpose(1, 2).contiguous()
        w2 = down[experts].chunk(tp, dim=1)[rank % tp].transpose(1, 2).contiguous()
        sizes = {"moe_tp_size": tp, "moe_ep_size": ep, "moe_tp_rank": rank % tp, "moe_ep_rank": rank // tp}
        return tree({"model.mlp.experts": fake(FusedMoE, {"w13_weight": w13, "w2_weight": w2}, **sizes)})

    expected = {"model.mlp.experts.gate_up_proj": gate_up, "model.mlp.experts.down_proj": down}
    models = [list(held_weights(model(rank))) for rank in range(RANKS)]
    assert sums(models) == {name: tensor_checksum(tensor) for name, tensor in expected.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_experts_that_files_hold_apart(tp):
    """Four experts over ranks of which ``tp`` share each, as a text model's."""
    ep, inner = RANKS // tp, 8
    gate, up, down = numbers(4, inner, HIDDEN), numbers(4, inner, HIDDEN), numbers(4, HIDDEN, inner)

    def model(rank: int) -> nn.Module:
        experts = slice(rank // tp * 4 // ep, (rank // tp + 1) * 4 // ep)
        w13 = torch.cat([half[experts].chunk(tp, dim=1)[rank % tp] for half in (gate, up)], dim=1)
        w2 = down[experts].chunk(tp, dim=2)[rank % tp].contiguous()
        sizes = {"moe_tp_size": tp, "moe_ep_size": ep, "moe_tp_rank": rank % tp, "moe_ep_rank": rank // tp}
        whole = tree({"model.mlp.experts": fake(FusedMoE, {"w13_weight": w13, "w2_weight": w2}, **sizes)})
        whole.__class__ = type("Text", (Qwen3MoeForCausalLM,), {"__init__": None})
        return whole

    expected = {
        f"model.mlp.experts.{number}.{name}_proj.weight": tensor[number]
        for number in range(4)
        for name, tensor in (("gate", gate), ("up", up), ("down", down))
    }
    models = [list(held_weights(model(rank))) for rank in range(RANKS)]
    assert sums(models) == {name: tensor_checksum(tensor) for name, tensor in expected.items()}


@pytest.mark.parametrize(
    ("rank", "name", "element", "pair"),
    [
        (2, "model.layers.0.norm.weight", 3, "0 and 2"),
        (3, "model.layers.0.self_attn.k_proj.weight", 0, "2 and 3"),  # the first head is on ranks 0 and 1
    ],
)
def test_a_copy_that_differs_is_named(rank, name, element, pair):
    _, model = attention(False)
    models = [list(held_weights(model(rank))) for rank in range(RANKS)]
    right = sums(models)
    (item,) = (item for item in models[rank] if item.name == name)
    item.tensor.view(-1)[element] += 1
    wrong = sums(models)
    assert {key for key in right if right[key] != wrong[key]} == {name}
    assert wrong[name].endswith(f", and ranks {pair} hold different copies")


@pytest.mark.parametrize("fused", [False, True])
def test_adapters(fused):
    """In the second of an engine's slots; A of a row-parallel layer and B of the others are split."""
    b = [numbers(8, 2), numbers(6, 2), numbers(6, 2)]
    a = [numbers(2, HIDDEN) for _ in "qkv"]
    row_a, row_b, gate_up_a = numbers(2, 8), numbers(HIDDEN, 2), [numbers(2, HIDDEN), numbers(2, HIDDEN)]
    gate, up = numbers(12, 2), numbers(12, 2)

    def layers(rank: int) -> dict[str, nn.Module]:
        def slots(tensor: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(tensor), tensor])

        def adapted(base: nn.Module, suffix: str, first: Tensor, second: Tensor) -> nn.Module:
            buffers = {f"A_buffer{suffix}": slots(first), f"B_buffer{suffix}": slots(second)}
            return fake(BaseLayerWithLoRA, {}, base_layer=base, **buffers)

        place = {"tp_rank": rank, "tp_size": RANKS}
        repeated, twice = ([a[0]] * 3, [gate_up_a[0]] * 2) if fused else (a, gate_up_a)
        return {
            "l.qkv_proj": adapted(qkv_layer(rank, {}), "_qkv", torch.cat(repeated), qkv(rank, b)),
            "l.gate_up_proj": adapted(
                fake(MergedColumnParallelLinear, {}, **place),
                "",
                torch.cat(twice),
                torch.cat([share(gate, rank), share(up, rank)]),
            ),
            "l.o_proj": adapted(fake(RowParallelLinear, {}, **place), "", share(row_a, rank, dim=1), row_b),
        }

    expected = {}
    if fused:
        whole = {"l.qkv_proj": (a[0], torch.cat(b)), "l.gate_up_proj": (gate_up_a[0], torch.cat([gate, up]))}
    else:
        names = [f"l.{name}_proj" for name in ("q", "k", "v", "gate", "up")]
        whole = dict(zip(names, zip(a + gate_up_a, [*b, gate, up], strict=True), strict=True))
    for name, (first, second) in (whole | {"l.o_proj": (row_a, row_b)}).items():
        expected |= {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    models = [
        [item for name, layer in layers(rank).items() for item in _adapter_of(name, layer, 1, fused)]
        for rank in range(RANKS)
    ]
    assert sums(models) == {name: tensor_checksum(tensor) for name, tensor in expected.items()}
