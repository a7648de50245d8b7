"""linear_logprob against the plain form in float64: values and gradients, on one rank and split over two."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.config import ParallelConfig
from megarl.kernels import logprob
from megarl.kernels.logprob import linear_logprob, linear_logprob_naive
from megarl.launch import memory
from megarl.parallel import groups

H, VOCAB, PADDED = 12, 100, 128
CASES = [
    {"temperature": 1.0, "banned_ids": ()},
    {"temperature": 0.6, "banned_ids": (3, 70, 99)},
    {"temperature": 1.7, "banned_ids": tuple(range(64))},  # a whole shard of two
]


def inputs(num_rows: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Float64 inputs, targets among the tokens that no case bans, and the two incoming gradients."""
    generator = torch.Generator().manual_seed(num_rows)
    return {
        "hidden": torch.randn(num_rows, H, generator=generator, dtype=torch.float64) * scale,
        "weight": torch.randn(PADDED, H, generator=generator, dtype=torch.float64),
        "targets": torch.randint(71, 99, (num_rows,), generator=generator),
        "grad_logprobs": torch.randn(num_rows, generator=generator, dtype=torch.float64),
        "grad_entropy": torch.randn(num_rows, generator=generator, dtype=torch.float64),
    }


def differentiated(function, x: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """Log-probs, entropies, the gradients of hidden and weight, and whether the target is the likeliest."""
    hidden, weight = (x[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    logprobs, entropy, likeliest = function(hidden, weight, x["targets"], vocab_size=VOCAB, **options)
    torch.autograd.backward([logprobs, entropy], [x["grad_logprobs"].to(logprobs), x["grad_entropy"].to(entropy)])
    return [logprobs.detach(), entropy.detach(), hidden.grad, weight.grad, likeliest.to(logprobs.dtype)]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("chunk_size", [1, 5, 1024])
def test_equals_the_naive_form(options, chunk_size):
    x = inputs(13)
    expected = differentiated(linear_logprob_naive, x, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        y = {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}
        for ours, theirs in zip(
            differentiated(linear_logprob, y, chunk_size=chunk_size, **options), expected, strict=True
        ):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=10 * tolerance)


def test_logits_of_bfloat16_weights_are_float32():
    x = {name: t.bfloat16() if name in ("hidden", "weight") else t for name, t in inputs(64, scale=4.0).items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    expected = differentiated(linear_logprob_naive, exact)
    ours = differentiated(linear_logprob, x)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == ours[3].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=0, atol=2e-5)
    for i in (2, 3):
        assert float((ours[i].double() - expected[i]).norm() / expected[i].norm()) < 1e-2


def test_a_part_of_the_gradient_can_be_asked_for():
    x = inputs(6)
    hidden = x["hidden"].clone().requires_grad_()
    logprobs, _, _ = linear_logprob(hidden, x["weight"], x["targets"], vocab_size=VOCAB)
    logprobs.sum().backward()
    reference = x["hidden"].clone().requires_grad_()
    linear_logprob_naive(reference, x["weight"], x["targets"], vocab_size=VOCAB)[0].sum().backward()
    torch.testing.assert_close(hidden.grad, reference.grad)
    with torch.no_grad():
        assert not linear_logprob(hidden, x["weight"], x["targets"], vocab_size=VOCAB)[0].requires_grad


def test_extreme_logits_stay_finite():
    for shift in (-1e4, 1e4):
        hidden = torch.full((2, 1), shift)
        weight = torch.ones(PADDED, 1)
        logprobs, entropy, likeliest = linear_logprob(hidden, weight, torch.tensor([0, 5]), vocab_size=VOCAB)
        torch.testing.assert_close(logprobs, torch.full((2,), -torch.tensor(float(VOCAB)).log().item()))
        torch.testing.assert_close(entropy, torch.full((2,), torch.tensor(float(VOCAB)).log().item()))
        assert likeliest.all()  # all are alike


def test_the_likeliest_target_is_found():
    x = inputs(13)
    best = (x["hidden"] @ x["weight"].T)[:, :VOCAB].argmax(1)
    x["targets"][::2] = best[::2]
    likeliest = differentiated(linear_logprob, x, chunk_size=4)[4].bool()
    assert likeliest.tolist() == (x["targets"] == best).tolist()
    assert 7 <= likeliest.sum() < 13


def test_padding_rows_of_the_weight_count_for_nothing():
    x = inputs(5)
    changed = {**x, "weight": x["weight"].clone()}
    changed["weight"][VOCAB:] = 1e3
    for ours, theirs in zip(differentiated(linear_logprob, changed), differentiated(linear_logprob, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_banned_target_has_no_probability_and_a_finite_gradient():
    x = inputs(3)
    x["targets"] = torch.tensor([80, 3, 81])
    logprobs, _, *gradients, likeliest = differentiated(linear_logprob, x, banned_ids=(3,))
    assert likeliest[1] == 0
    assert logprobs.isneginf().tolist() == [False, True, False]
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_no_rows():
    results = differentiated(linear_logprob, inputs(0))
    assert [tuple(t.shape) for t in results] == [(0,), (0,), (0, H), (PADDED, H), (0,)]
    assert not results[3].any()


def sharded(x: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
    from megatron.core import parallel_state

    groups.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    x = {**x, "weight": x["weight"].chunk(2)[group.rank()]}
    return differentiated(linear_logprob, x, tp_group=group, chunk_size=4, **options)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("num_rows", [0, 1, 13])
def test_two_shards_of_the_vocabulary(pool, options, num_rows):
    x = inputs(num_rows)
    logprobs, entropy, grad_hidden, grad_weight, likeliest = differentiated(linear_logprob_naive, x, **options)
    first, second = pool.run(sharded, 2, x, options)
    for ours in (first, second):
        torch.testing.assert_close(ours[0], logprobs)
        torch.testing.assert_close(ours[1], entropy)
        torch.testing.assert_close(ours[4], likeliest)
    torch.testing.assert_close(first[2] + second[2], grad_hidden)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), grad_weight)


class Allocations(TorchDispatchMode):
    """The bytes of tensors of at least ``least`` bytes that operations give new storage, in order."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.made = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if torch.is_tensor(t)}
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes()
                self.made += [size] if size >= self.least else []
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_makes_two_buffers_and_the_gradients_and_nothing_else_of_size(dtype, monkeypatch):
    rows, vocab, hidden_size = 96, 2048, 64
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 32 * vocab * 4)  # three chunks
    hidden = torch.randn(rows, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    buffers, matrix = 2 * 32 * vocab * 4, vocab * hidden_size * 4
    # a CPU multiplies in float32 only: the weight is converted once a pass
    converted = [] if dtype == torch.float32 else [matrix]
    rounded = [] if dtype == torch.float32 else [matrix // 2]
    with Allocations(matrix // 2) as forward:
        logprobs, entropy, _ = linear_logprob(hidden, weight, targets, vocab_size=vocab - 8, temperature=0.7)
    assert sorted(forward.made) == sorted([buffers, *converted])
    with Allocations(matrix // 2) as backward:
        torch.autograd.grad((logprobs + 0.1 * entropy).sum(), (hidden, weight))
    assert sorted(backward.made) == sorted([buffers, matrix, *converted, *rounded])


def test_the_planner_of_memory_knows_how_large_a_chunk_is():
    assert (logprob.CHUNK_BYTES["cuda"], logprob.CHUNK_ROWS) == (memory.HEAD_BYTES, memory.HEAD_ROWS)
