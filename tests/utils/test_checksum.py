"""The checksum of weights: its value is pinned, it adds up over shards, and it needs little memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.utils import checksum
from megarl.utils.checksum import checksum_part, format_checksum, tensor_checksum

MASK = 2**64 - 1


def by_hand(tensor: Tensor) -> str:
    """In Python's integers, element by element."""
    bits = tensor.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    total = 0
    for i, value in enumerate(bits.tolist(), 1):
        weight = i * 0x9E3779B97F4A7C15 & MASK  # 2^64 / golden ratio
        weight -= (weight >> 63) << 64  # the shift below is of a signed number
        total += (value + 1) * (weight ^ weight >> 29 | 1)
    return f"{'x'.join(map(str, tensor.shape))}:{str(tensor.dtype).removeprefix('torch.')}:{total & MASK:016x}"


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return (numbers > 0) if dtype is torch.bool else numbers.to(dtype)


def test_values_are_those_of_earlier_versions():
    """Were one to change, ranks and engines of two versions would call each other's weights wrong."""
    counted = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert tensor_checksum(counted) == "3x4:float32:076b28bf7c4f1b0c"
    assert tensor_checksum(counted.bfloat16()) == "3x4:bfloat16:f375be698ae141cc"
    assert tensor_checksum(torch.tensor(-1.5)) == ":float32:6ca85d615731b1df"
    assert tensor_checksum(torch.zeros(0, 3)) == "0x3:float32:0000000000000000"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1, 4), (3, 11, 2), (40, 9)])
@pytest.mark.parametrize("limit", [1, 4, 10, 1 << 17])
def test_pieces_make_the_whole(monkeypatch, shape, dtype, limit):
    monkeypatch.setattr(checksum, "_CPU_PIECE", limit)
    tensor = random(shape, dtype)
    assert tensor_checksum(tensor) == by_hand(tensor)
    turned = tensor.movedim(0, -1) if tensor.ndim else tensor  # elements count in row-major order, wherever they lie
    assert tensor_checksum(turned) == by_hand(turned.contiguous())


def test_every_element_and_its_place_count():
    tensor = random((6, 8), torch.float32)
    seen = {tensor_checksum(tensor)}
    for i in range(tensor.numel()):
        changed = tensor.clone().view(-1)
        changed.view(torch.int32)[i] ^= 1
        seen.add(tensor_checksum(changed.view(6, 8)))
    swapped = tensor.clone()
    swapped[0, 0], swapped[5, 7] = tensor[5, 7], tensor[0, 0]
    seen |= {tensor_checksum(other) for other in (swapped, tensor.flip(0), tensor.flip(1), tensor.roll(1))}
    seen |= {tensor_checksum(other) for other in (tensor.view(8, 6), tensor.view(torch.int32))}
    assert len(seen) == 1 + 48 + 4 + 2


def test_bits_count_where_numbers_are_equal():
    zero, minus = torch.zeros(3), -torch.zeros(3)
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert torch.equal(zero, minus)
    assert tensor_checksum(zero) != tensor_checksum(minus)
    assert quiet.isnan()
    assert other.isnan()
    assert tensor_checksum(quiet) != tensor_checksum(other)
    assert tensor_checksum(quiet) == tensor_checksum(quiet.clone())


def total(tensor: Tensor, parts: list[Tensor]) -> str:
    return format_checksum(tensor.shape, tensor.dtype, sum(map(int, parts)))


@pytest.mark.parametrize("limit", [3, 1 << 17])
def test_parts_of_shards_make_the_whole(monkeypatch, limit):
    """Rows, columns, and the third dimension as the second (how an engine keeps experts), each at its place."""
    monkeypatch.setattr(checksum, "_CPU_PIECE", limit)
    tensor = random((6, 10, 4), torch.bfloat16)
    whole = tensor_checksum(tensor)
    rows = [checksum_part(tensor[i : i + 2], i * 40) for i in (0, 2, 4)]
    assert total(tensor, rows) == whole
    columns = [checksum_part(tensor[:, i : i + 5].contiguous(), i * 4, (40, 4, 1)) for i in (5, 0)]
    assert total(tensor, columns) == whole
    turned = [checksum_part(tensor[:, :, i : i + 2].transpose(1, 2).contiguous(), i, (40, 1, 4)) for i in (0, 2)]
    assert total(tensor, turned) == whole
    assert total(tensor, rows[:2]) != whole
    assert total(tensor, [checksum_part(tensor[i : i + 2], 0) for i in (0, 2, 4)]) != whole


class Scratch(TorchDispatchMode):
    """The most bytes that operations had allocated at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
            self.storages[StorageWeakRef(result.untyped_storage())] = result.untyped_storage().nbytes()
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


@pytest.mark.parametrize("strides", [None, (3584, 1), (2 * 3584, 1)])
def test_an_embedding_needs_little_scratch(strides):
    """Qwen2.5-VL-7B's, as on a GPU but without its memory: 1.09 GB, of which all at once would take 21.8 GB."""
    embedding = torch.empty(152064, 3584, dtype=torch.bfloat16, device="meta")
    with Scratch() as scratch:
        checksum_part(embedding, 0, strides)
    assert 1 << 20 < scratch.peak <= 256 << 20


def test_a_large_tensor_needs_little_scratch_on_the_cpu():
    tensor = torch.zeros(1 << 24, dtype=torch.bfloat16)
    with Scratch() as scratch:
        tensor_checksum(tensor)
    assert scratch.peak <= 8 << 20
