import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from megarl.config import ParallelConfig, RunConfig
from megarl.data.packing import Packing, assign_to_bins, by_sample, pack, pack_assigned, pack_bins
from megarl.data.sharing import Encoding
from megarl.types import Media, Prompt, Sample


def positions(tokens, media):
    return np.arange(len(tokens))[None] + 100 * len(media.images)


def packing(**changes):
    encoding = Encoding(
        num_tokens=lambda media: media.grids.prod(axis=1), cost=lambda media: media.grids.prod(axis=1), max_patches=1000
    )
    defaults = {"max_tokens": 64, "max_patches": 1000, "multiple": 4, "position_ids": positions, "encoding": encoding}
    return Packing(**defaults | changes)


def sample(length, *, group=0, image=None, start=0):
    mask = np.arange(length) >= 2
    return Sample(
        prompt=Prompt(f"t/train/{group}", "t", []),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=-np.arange(length, dtype=np.float32) * mask,
        expert_mask=mask & (np.arange(length) == 3),
        advantages=mask * 2.0,
        loss_weights=mask * 0.5,
        tokens=np.arange(start, start + length),
        media=Media([image], np.array([[1, 2, 4]]), np.array([[28, 56]]), np.zeros(1)) if image else Media(),
    )


def laid_out(batch, name):
    """[T]: the stream ``name`` [N] at its places, 0 elsewhere."""
    values = getattr(batch.streams, name)
    stream = np.zeros(len(batch.payload.tokens), values.dtype)
    stream[batch.payload.is_action] = values
    return stream


def test_every_stream_speaks_of_the_token_that_is_predicted():
    batch = pack([sample(4, start=10), sample(7, start=20, image=b"x")], packing(pad_token_id=99))
    # 3 + 6 tokens are read; padded to 12
    np.testing.assert_array_equal(batch.payload.tokens, [10, 11, 12, 20, 21, 22, 23, 24, 25, 99, 99, 99])
    np.testing.assert_array_equal(batch.payload.labels, [11, 12, 13, 21, 22, 23, 24, 25, 26, 99, 99, 99])
    np.testing.assert_array_equal(laid_out(batch, "loss_weights"), [0, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(laid_out(batch, "advantages"), laid_out(batch, "loss_weights") * 4)
    np.testing.assert_array_equal(laid_out(batch, "rollout_logprobs"), [0, -2, -3, 0, -2, -3, -4, -5, -6, 0, 0, 0])
    np.testing.assert_array_equal(
        laid_out(batch, "expert_mask"), [False, False, True] + [False, False, True] + [False] * 6
    )
    np.testing.assert_array_equal(batch.payload.cu_seqlens, [0, 3, 9, 12])
    np.testing.assert_array_equal(batch.payload.parents, [-1, -1, -1])
    np.testing.assert_array_equal(batch.payload.sequence_ids, [0] * 3 + [1] * 6 + [2] * 3)
    np.testing.assert_array_equal(batch.payload.position_ids, [[0, 1, 2, *range(100, 106), 0, 1, 2]])
    assert batch.num_actions == 7
    assert batch.payload.vision[0].media.images == [b"x"]


def test_estimates_travel_and_come_back_to_their_samples():
    """Whatever the bins: what is said of the actions of a bin is split among its samples, shared prompts or not."""
    samples = [sample(length, group=group) for group, length in ((1, 6), (0, 3), (1, 9), (0, 12), (2, 5))]
    samples[2].loss_mask[4] = False  # a tool's word
    for number, one in enumerate(samples):
        one.returns = (100 * number + np.arange(len(one.tokens))).astype(np.float32)
        one.loss_weights = one.loss_mask.astype(np.float32)
        one.prompt, one.media = next((s.prompt, s.media) for s in samples if s.group_id == one.group_id)
    for share_prompts in (False, True):
        how = packing(max_tokens=20, share_prompts=share_prompts, estimates=("values", "returns"))
        bins = assign_to_bins(samples, how, 2)
        packed = pack_assigned(samples, bins, how)
        streams = [batch.streams for rank in packed for batch in rank]
        assert all(one.old_logprobs is None and not one.values.any() for one in streams)
        said = [[batch.streams.returns for batch in rank] for rank in packed]
        for one, returned in zip(samples, by_sample(samples, bins, said), strict=True):
            np.testing.assert_array_equal(returned, one.returns[one.loss_mask])


def test_a_shared_prompt_is_laid_out_once():
    first, second, other = sample(4, start=10, image=b"x"), sample(6, start=10), sample(5, group=1, start=30)
    second.prompt, second.media = first.prompt, first.media
    batch = pack([first, second, other], packing(multiple=1, share_prompts=True))
    # of the prompt 10 11, the last token is read by each sample
    np.testing.assert_array_equal(batch.payload.tokens, [10, 11, 12, 11, 12, 13, 14, 30, 31, 32, 33])
    np.testing.assert_array_equal(batch.payload.labels, [11, 12, 13, 12, 13, 14, 15, 31, 32, 33, 34])
    np.testing.assert_array_equal(laid_out(batch, "loss_weights"), [0, *[0.5] * 6, 0, *[0.5] * 3])
    np.testing.assert_array_equal(laid_out(batch, "rollout_logprobs"), [0, -2, -3, -2, -3, -4, -5, 0, -2, -3, -4])
    np.testing.assert_array_equal(np.flatnonzero(laid_out(batch, "expert_mask")), [2, 4, 9])
    np.testing.assert_array_equal(batch.payload.cu_seqlens, [0, 1, 3, 7, 11])
    np.testing.assert_array_equal(batch.payload.parents, [-1, 0, 0, -1])
    np.testing.assert_array_equal(batch.payload.position_ids, [[100, 101, 102, 101, 102, 103, 104, 0, 1, 2, 3]])
    assert batch.payload.vision[0].media.images == [b"x"]


def test_sequences_are_padded_so_that_ranks_can_cut_them():
    first, second = sample(4, start=10), sample(9, start=20, image=b"x")
    batch = pack([first, second], packing(multiple=8, sequence_multiple=4, pad_token_id=99))
    # 3 and 8 tokens in 4 and 8, and 4 more for the bin
    np.testing.assert_array_equal(batch.payload.tokens, [10, 11, 12, 99, *range(20, 28), *[99] * 4])
    np.testing.assert_array_equal(batch.payload.labels, [11, 12, 13, 99, *range(21, 29), *[99] * 4])
    np.testing.assert_array_equal(batch.payload.cu_seqlens, [0, 4, 12, 16])
    np.testing.assert_array_equal(batch.payload.lengths, [3, 8, 0])
    np.testing.assert_array_equal(batch.payload.sequence_ids, [0] * 4 + [1] * 8 + [2] * 4)
    np.testing.assert_array_equal(laid_out(batch, "loss_weights"), [0, 0.5, 0.5, 0, 0, *[0.5] * 7, *[0] * 4])
    np.testing.assert_array_equal(batch.payload.position_ids, [[0, 1, 2, 0, *range(100, 108), 0, 1, 2, 3]])
    assert len(pack([], packing(multiple=8, sequence_multiple=4)).payload.tokens) == 8
    # what is padded counts: 4 + 8 fill a bin of 12 tokens
    assert len(assign_to_bins([first, second], packing(max_tokens=12, sequence_multiple=4), 1)[0]) == 1
    assert len(assign_to_bins([first, second], packing(max_tokens=12, sequence_multiple=8), 1)[0]) == 2


def test_layouts_of_ranks_decide_the_padding():
    def of(**parallel):
        processor = SimpleNamespace(position_ids=None, num_tokens=None, encoding_cost=None, eos_token_ids=[0])
        p = Packing.of(RunConfig(parallel=ParallelConfig(**parallel)), processor)
        return p.multiple, p.sequence_multiple, p.num_bins_multiple

    tp, pp, cp = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    assert of(**{tp: 2, "sequence_parallel": True}) == (2, 1, 1)
    assert of(**{cp: 2}) == (4, 4, 1)
    assert of(**{cp: 2, tp: 4, "sequence_parallel": True}) == (8, 4, 1)
    assert of(**{cp: 2, tp: 3, "sequence_parallel": True}) == (12, 4, 1)
    assert of(**{pp: 2}) == (1, 1, 1)
    assert of(**{pp: 2, "virtual_pipeline_model_parallel_size": 2}) == (1, 1, 2)


def test_bins_are_filled_by_what_sharing_leaves():
    samples = [sample(12) for _ in range(8)]  # prompts of 2 tokens
    for s in samples:
        s.prompt, s.media, s.loss_mask = samples[0].prompt, samples[0].media, np.arange(12) >= 9
    tokens = {share: packing(max_tokens=33, multiple=1, share_prompts=share) for share in (False, True)}
    assert [len(rank) for rank in assign_to_bins(samples, tokens[False], 1)] == [3]
    (bins,) = assign_to_bins(samples, tokens[True], 1)  # 8 + 8 x 3 tokens
    assert bins == [list(range(8))]
    assert len(pack([samples[i] for i in bins[0]], tokens[True]).payload.tokens) == 32


def test_an_action_that_weighs_nothing_is_an_action():
    one, other = sample(7), sample(5, start=20)
    one.loss_weights[3] = 0
    bins = assign_to_bins([one, other], packing(), 1)
    ((batch,),) = pack_assigned([one, other], bins, packing())
    assert batch.num_actions == 5 + 3
    np.testing.assert_array_equal(batch.streams.loss_weights, [0.5, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    (kept, whole) = by_sample([one, other], bins, [[batch.streams.rollout_logprobs]])
    np.testing.assert_array_equal(kept, [-2, -3, -4, -5, -6])
    np.testing.assert_array_equal(whole, [-2, -3, -4])


def test_an_empty_bin_weighs_nothing():
    batch = pack([], packing(multiple=4))
    assert len(batch.payload.tokens) == 4
    assert batch.num_actions == 0
    np.testing.assert_array_equal(batch.payload.cu_seqlens, [0, 4])


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


def test_an_interleaved_pipeline_gets_a_multiple_of_bins():
    ranks = assign_to_bins([sample(9) for _ in range(12)], packing(max_tokens=40, num_bins_multiple=2), 2)
    assert [[len(bin) for bin in rank] for rank in ranks] == [[3, 3], [3, 3]]
    assert assign_to_bins([sample(5)], packing(num_bins_multiple=2), 2) == [[[0], []], [[], []]]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_ranks_that_wait_for_each_other_have_as_much_to_do(share_prompts):
    random = np.random.default_rng(0)
    samples = [sample(int(n), group=g // 8, image=b"x") for g, n in enumerate(random.integers(5, 60, 200))]
    p = packing(max_tokens=400, multiple=1, share_prompts=share_prompts)
    apart = packing(max_tokens=400, multiple=1, encoding=dataclasses.replace(p.encoding, balance=False))

    def slack(ranks):
        tokens = np.array([[sum(len(samples[i].tokens) for i in bin) for bin in rank] for rank in ranks])
        return tokens.max(axis=0).sum() / tokens.mean(axis=0).sum()

    assert slack(assign_to_bins(samples, p, 4)) < 1.03 < slack(assign_to_bins(samples, apart, 4))


def test_a_shared_prompt_stays_whole():
    families = [[sample(n, group=g) for n in lengths] for g, lengths in enumerate([[30, 20], [9, 8, 7], [12], [25]])]
    for family in families:
        for s in family:
            s.prompt, s.media = family[0].prompt, family[0].media
    samples = [s for family in families for s in family]
    ranks = assign_to_bins(samples, packing(max_tokens=60, multiple=1, share_prompts=True), 2)
    assert ranks == [[[0, 1]], [[2, 3, 4, 5, 6]]]


def test_fewer_samples_than_ranks_and_none_at_all():
    assert assign_to_bins([sample(5)], packing(), 3) == [[[0]], [[]], [[]]]
    assert [len(rank) for rank in pack_bins([], packing(), 2)] == [1, 1]


def test_a_sample_that_fits_no_bin_is_named():
    with pytest.raises(ValueError, match=r"t/train/7: 99 tokens.*trainer\.max_tokens_per_microbatch=64"):
        assign_to_bins([sample(100, group=7)], packing(), 1)


def test_a_packed_token_is_at_most_28_bytes():
    """Half prompt, half response, three rows of positions: each byte travels to every rank of a replica."""

    def positions(tokens, media):
        return np.tile(np.arange(len(tokens)), (3, 1))

    samples = []
    for group in range(8):
        one = sample(2048, group=group)
        one.loss_mask[:1024] = False
        one.loss_weights = 0.5 * one.loss_mask
        samples.append(one)
    batch = pack(samples, packing(max_tokens=1 << 15, position_ids=positions))
    arrays = [value for value in vars(batch).values() if isinstance(value, np.ndarray)]
    num_bytes = sum(array.nbytes for array in arrays) / len(batch.payload.tokens)
    print(f"{num_bytes:.1f} bytes a token")
    assert num_bytes <= 28
    assert batch.payload.labels.dtype == np.int32
