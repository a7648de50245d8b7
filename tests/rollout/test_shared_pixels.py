"""Features in shared memory: written once for the requests of a prompt, copied once, gone with the prompt."""

import pickle
from pathlib import Path

import pytest
import torch

from megarl.rollout import cpu_shims

cpu_shims.install()

from sglang.srt.managers import mm_utils  # noqa: E402
from sglang.srt.managers.mm_utils import ShmPointerMMData  # noqa: E402

from megarl.rollout import shared_pixels  # noqa: E402


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(mm_utils, "_wrap_shm_or_inline", mm_utils._wrap_shm_or_inline)  # put back afterwards
    for name in ("materialize", "close_and_unlink"):
        monkeypatch.setattr(ShmPointerMMData, name, getattr(ShmPointerMMData, name))
    shared_pixels.install()


def arrive(pointer):
    """What a scheduler gets."""
    return mm_utils._unwrap_tensor_or_list(pickle.loads(pickle.dumps(pointer)))


def exists(pointer):
    return (Path("/dev/shm") / pointer.shm_name).exists()


def test_requests_of_a_prompt_name_the_same_segment():
    pixels = torch.randn(6, 4)
    both = pixels.split([2, 4])
    with shared_pixels.lend():
        # the second time as other views of the same memory, as a processor makes them for each request
        pointers = [mm_utils._wrap_tensor_or_list(part) for part in (*both, *pixels.split([2, 4]))]
        assert [p.shm_name for p in pointers[:2]] == [p.shm_name for p in pointers[2:]]
        assert len({p.shm_name for p in pointers}) == 2
        arrived = [arrive(p) for p in pointers]
        assert arrived[0] is arrived[2]  # requests share the scheduler's copy
        for part, there in zip((*both, *both), arrived, strict=True):
            torch.testing.assert_close(there, part, rtol=0, atol=0)
        del arrived, there
        torch.testing.assert_close(arrive(pointers[1]), both[1])  # and a late one finds the segment still there
    assert not any(map(exists, pointers))


def test_a_segment_goes_when_its_prompt_fails():
    with pytest.raises(RuntimeError, match="died"), shared_pixels.lend():  # noqa: PT012
        pointer = mm_utils._wrap_tensor_or_list(torch.ones(3))
        assert exists(pointer)
        raise RuntimeError("the engine died")
    assert not exists(pointer)


def test_prompts_at_the_same_time_share_nothing():
    pixels = torch.ones(3)
    with shared_pixels.lend():
        outer = mm_utils._wrap_tensor_or_list(pixels)
        with shared_pixels.lend():
            inner = mm_utils._wrap_tensor_or_list(pixels)
        assert outer.shm_name != inner.shm_name
        assert (exists(outer), exists(inner)) == (True, False)


def test_without_room_the_features_themselves_are_sent(monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(mm_utils, "ShmPointerMMData", full)
    pixels = torch.ones(3)
    with shared_pixels.lend():
        assert mm_utils._wrap_shm_or_inline(pixels) is pixels
