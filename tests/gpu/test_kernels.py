"""The log-prob head and the experts in bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.data.processors.levels import look_up
from megarl.kernels.logprob import linear_logprob, linear_logprob_naive
from megarl.utils.checksum import tensor_checksum
from tests.gpu.processes import DEVICES

VOCAB = {"cpu": 3000, "cuda": 151936}


def logprob_case(device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1500, 256), torch.randn(VOCAB[device], 256) * 0.2
    targets = torch.randint(0, VOCAB[device], (1500,))
    on = [t.bfloat16().to(device).to(dtype).requires_grad_() for t in (hidden, weight)]
    return [*on, targets.to(device)]


@pytest.mark.parametrize("device", DEVICES)
def test_linear_logprob(device):
    """Logits are not rounded to bfloat16 on their way: that alone would be an error of 3e-2."""
    options = {"vocab_size": VOCAB[device] - 8, "temperature": 0.7, "banned_ids": (1, 5)}
    results = []
    for function, dtype in ((linear_logprob, torch.bfloat16), (linear_logprob_naive, torch.float64)):
        hidden, weight, targets = logprob_case(device, dtype)
        targets = targets.clamp(6, VOCAB[device] - 9)
        parts = [1500] if function is linear_logprob else [100] * 15  # float64 logits are held at once
        outputs = [
            function(h, weight, t, **options)[:2]
            for h, t in zip(hidden.split(parts), targets.split(parts), strict=True)
        ]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        (logprobs.sum() + 0.5 * entropy.sum()).backward()
        results.append([t.detach().double().cpu() for t in (logprobs, entropy, hidden.grad, weight.grad)])
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-3, rtol=0)
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_a_checksum_is_the_same_everywhere(device, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(1000, 257) * 50).to(dtype)
    assert tensor_checksum(tensor.to(device)) == tensor_checksum(tensor)
    assert tensor_checksum(tensor.to(device).T) == tensor_checksum(tensor.T.contiguous())


def experts(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """On a rank: output and gradients of ``Experts`` in bfloat16, and of the formula in float64."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megarl.config import ParallelConfig
    from megarl.models.common.experts import Experts
    from megarl.parallel import groups

    groups.initialize(ParallelConfig(), 0)
    hidden, inside, counts = 128, 64, [40, 0, 7, 129]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=len(counts),
        moe_ffn_hidden_size=inside,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=device == "cpu",
        init_method=lambda weight: torch.nn.init.normal_(weight, std=0.1),
        output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, std=0.1),
    )
    module = Experts(len(counts), config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    torch.manual_seed(1)
    tokens = torch.randn(sum(counts), hidden, dtype=torch.bfloat16, device=device).requires_grad_()
    probs = torch.rand(sum(counts), device=device).requires_grad_()
    weight = torch.randn(sum(counts), hidden, dtype=torch.bfloat16, device=device)
    output, _ = module(tokens, torch.tensor(counts), probs)
    (output * weight).sum().backward()
    ours = [output.detach(), tokens.grad, probs.grad, module.weight1.grad, module.weight2.grad]
    leaves = [t.detach().double().requires_grad_() for t in (tokens, probs, module.weight1, module.weight2)]
    x, p, first, second = leaves
    parts = []
    for expert, (rows, prob) in enumerate(zip(x.split(counts), p.split(counts), strict=True)):
        gate, up = (rows @ first[expert]).chunk(2, -1)
        parts.append((F.silu(gate) * up * prob[:, None]) @ second[expert])
    reference = torch.cat(parts)
    (reference * weight.double()).sum().backward()
    theirs = [reference.detach(), *(leaf.grad for leaf in leaves)]
    return [t.double().cpu() for t in ours], [t.cpu() for t in theirs]


@pytest.mark.parametrize("device", DEVICES)
def test_experts(device, ranks):
    ((ours, theirs),) = ranks(device, experts, 1, device)
    names = ("output", "tokens", "probs", "weight1", "weight2")
    for name, mine, other in zip(names, ours, theirs, strict=True):
        error = float((mine - other).norm() / other.norm())
        assert error < 2e-2, f"{name}: {error:.4f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_levels_of_pixels_are_those_of_the_table(device, dtype):
    torch.manual_seed(0)
    levels, pixels = torch.randn(3, 256).to(dtype), torch.randint(0, 256, (500, 1176), dtype=torch.uint8)
    found = look_up(pixels.to(device), levels.to(device)).cpu()
    channels = pixels.view(500, 3, 392)
    assert torch.equal(found.view(500, 3, 392), torch.stack([levels[c][channels[:, c].long()] for c in range(3)], 1))
