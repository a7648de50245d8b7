import numpy as np
import pytest

from megarl.data.packing import Packing, assign_to_bins, pack, pack_bins
from megarl.types import Media, Prompt, Sample


def positions(tokens, grids):
    return np.arange(len(tokens))[None] + 100 * len(grids)


def packing(**changes):
    return Packing(**{"max_tokens": 64, "max_patches": 1000, "multiple": 4, "position_ids": positions} | changes)


def sample(length, *, group=0, image=None, start=0):
    mask = np.arange(length) >= 2
    return Sample(
        prompt=Prompt(f"t/train/{group}", "t", []),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=-np.arange(length, dtype=np.float32) * mask,
        advantages=mask * 2.0,
        loss_weights=mask * 0.5,
        tokens=np.arange(start, start + length),
        media=Media([image], np.array([[1, 2, 4]])) if image else Media(),
    )


def test_every_stream_speaks_of_the_token_that_is_predicted():
    batch = pack([sample(4, start=10), sample(7, start=20, image=b"x")], packing(pad_token_id=99))
    # 3 + 6 tokens are read; padded to 4 + 8
    np.testing.assert_array_equal(batch.tokens, [10, 11, 12, 13, 20, 21, 22, 23, 24, 25, 26, 99])
    np.testing.assert_array_equal(batch.labels, [11, 12, 13, 99, 21, 22, 23, 24, 25, 26, 99, 99])
    np.testing.assert_array_equal(batch.loss_weights, [0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(batch.advantages, batch.loss_weights * 4)
    np.testing.assert_array_equal(batch.rollout_logprobs, [0, -2, -3, 0, 0, -2, -3, -4, -5, -6, 0, 0])
    np.testing.assert_array_equal(batch.cu_seqlens, [0, 4, 12])
    np.testing.assert_array_equal(batch.sequence_ids, [0] * 4 + [1] * 8)
    np.testing.assert_array_equal(batch.position_ids, [[0, 1, 2, 3, *range(100, 108)]])
    assert batch.num_actions == 7
    assert batch.media.images == [b"x"]


def test_an_empty_bin_weighs_nothing():
    batch = pack([], packing(multiple=4))
    assert len(batch.tokens) == 4
    assert batch.num_actions == 0
    np.testing.assert_array_equal(batch.cu_seqlens, [0, 4])


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_sample_once_and_keep_their_bounds(seed, data_parallel_size):
    random = np.random.default_rng(seed)
    samples = [
        sample(int(random.integers(3, 60)), group=g, image=b"%d" % g)
        for g in range(int(random.integers(1, 12)))
        for _ in range(3)
    ]
    p = packing(max_patches=30)
    ranks = assign_to_bins(samples, p, data_parallel_size)
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for bin in rank for i in bin) == list(range(len(samples)))
    for bin in (bin for rank in ranks for bin in rank):
        assert sum(p.length(samples[i]) for i in bin) <= 64
        assert 8 * len({samples[i].group_id for i in bin}) <= 30  # a group's image counts once


def test_bins_are_balanced():
    ranks = assign_to_bins([sample(9) for _ in range(16)], packing(max_tokens=1000), 4)
    assert [[len(bin) for bin in rank] for rank in ranks] == [[4], [4], [4], [4]]


def test_fewer_samples_than_ranks_and_none_at_all():
    assert assign_to_bins([sample(5)], packing(), 3) == [[[0]], [[]], [[]]]
    assert [len(rank) for rank in pack_bins([], packing(), 2)] == [1, 1]


def test_a_sample_that_fits_no_bin_is_named():
    with pytest.raises(ValueError, match=r"t/train/7: 100 tokens.*trainer\.max_tokens_per_microbatch=64"):
        assign_to_bins([sample(100, group=7)], packing(), 1)
