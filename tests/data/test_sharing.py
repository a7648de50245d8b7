"""Plans are checked by carrying them out: every rank sends what its share says, and shows what arrives."""

import numpy as np
import pytest
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from megarl.data.packing import pack_microbatch
from megarl.data.processors.qwen_vl import tower_cost
from megarl.data.sharing import Encoding, assign_images, balance_metrics, share_images
from megarl.data.vision_cost import TowerCost
from megarl.types import Media
from tests.data.test_packing import packing, sample


def images(*sides, name=""):
    """Images of ``side`` x ``side`` patches; equal names are equal images."""
    sides = list(sides)
    return Media(
        [f"{name}{number}".encode() for number in range(len(sides))],
        np.array([[1, side, side] for side in sides], np.int64).reshape(-1, 3),
        np.array([[side, side] for side in sides], np.int64).reshape(-1, 2) * 14,
        np.zeros(len(sides), np.float32),
    )


def cost(media):
    patches = media.grids.prod(axis=1).astype(float)
    return 20 * patches + patches**2 / 100


def encoding(**changes):
    defaults = {"num_tokens": lambda media: media.grids.prod(axis=1) // 4, "cost": cost, "max_patches": 10**6}
    return Encoding(**defaults | changes)


def shown_after(shares, num_tokens):
    """What each rank shows when all of them follow their shares: images by name."""
    if all(share.exchange is None for share in shares):
        return [[share.media.images[i] for i in share.index] for share in shares]
    mail = [[[] for _ in shares] for _ in shares]  # by receiver and sender
    for sender, share in enumerate(shares):
        lengths, exchange = num_tokens(share.media), share.exchange
        leaving = iter(exchange.sends.tolist())
        for receiver, tokens in enumerate(exchange.send_tokens.tolist()):
            while tokens > 0:
                image = next(leaving)
                mail[receiver][sender].append((share.media.images[image], int(lengths[image])))
                tokens -= int(lengths[image])
            assert tokens == 0
        assert not list(leaving)
    result = []
    for share, senders in zip(shares, mail, strict=True):
        assert share.exchange.receive_tokens.tolist() == [sum(length for _, length in box) for box in senders]
        arrived = [letter for box in senders for letter in box]
        assert share.exchange.lengths.tolist() == [length for _, length in arrived]
        assert len({name for name, _ in arrived}) == len(arrived)
        result.append([arrived[i][0] for i in share.index])
    return result


@pytest.mark.parametrize("context_parallel_size", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_encoded_once_and_shown_where_it_belongs(seed, context_parallel_size):
    random = np.random.default_rng(seed)
    pool = images(*random.integers(1, 12, 9) * 2, name="pool")
    shown = [pool.select(random.integers(0, 9, random.integers(0, 6))) for _ in range(int(random.integers(1, 5)))]
    e = encoding(context_parallel_size=context_parallel_size)
    plan = share_images(shown, e)
    assert [len(ranks) for ranks in plan] == [context_parallel_size] * len(shown)
    shares = [share for ranks in plan for share in ranks]
    if shares[0] is None:
        assert shares == [None] * len(shares)
        assert not any(media.images for media in shown)
        return
    encoded = [name for share in shares for name in share.media.images]
    assert sorted(encoded) == sorted({name for media in shown for name in media.images})
    assert len({share.exchange is None for share in shares}) == 1
    expected = [media.images for media in shown for _ in range(context_parallel_size)]
    assert shown_after(shares, e.num_tokens) == expected
    again = [share for ranks in share_images(shown, e) for share in ranks]
    assert [share.media.images for share in again] == [share.media.images for share in shares]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_one_bin_with_large_images_is_shared_by_all(num_ranks, seed):
    random = np.random.default_rng(seed)
    large = images(*random.integers(30, 60, 40) * 2, name="large")
    shown = [large] + [images(2, 4, name=f"tiny{rank}") if rank % 2 else images() for rank in range(1, num_ranks)]
    shares = [share for (share,) in share_images(shown, encoding())]
    costs = np.array([share.cost for share in shares])
    assert costs.sum() == pytest.approx(sum(cost(media).sum() for media in shown))
    assert costs.max() / costs.mean() <= 1.1
    alone = [share.cost if share else 0.0 for (share,) in share_images(shown, encoding(balance=False))]
    assert max(alone) / np.mean(alone) > 0.99 * num_ranks


def test_cost_decides_and_not_the_number_of_images():
    shares = [share for (share,) in share_images([images(64, *[8] * 100), images()], encoding())]
    assert sorted(len(share.media.images) for share in shares) == [1, 100]  # 4096 patches, and 100 x 64


def test_equal_bins_keep_their_images_and_exchange_nothing():
    shown = [images(8, 6, 8, name=f"rank{rank}") for rank in range(4)]
    shares = [share for (share,) in share_images(shown, encoding())]
    assert [sorted(share.media.images) for share in shares] == [sorted(media.images) for media in shown]
    assert all(share.exchange is None for share in shares)


def test_context_parallel_ranks_share_their_bin():
    ((first, second),) = share_images([images(4, 4)], encoding(context_parallel_size=2))
    assert [len(share.media.images) for share in (first, second)] == [1, 1]
    assert first.exchange.receive_tokens.tolist() == [4, 4]


def test_no_rank_encodes_more_patches_than_it_may():
    # two dear images, and two bins of cheap ones that would both fit the third rank by their cost
    owner = assign_images(
        np.array([5.0, 5, *[0.1] * 20]),
        np.array([50, 50, *[10] * 20]),
        [[0], [0], *[[1]] * 10, *[[2]] * 10],
        num_ranks=3,
        max_patches=100,
    )
    patches = np.bincount(owner, weights=[50, 50, *[10] * 20])
    assert patches.max() <= 100
    # no room but where they are
    costs, full = np.array([3.0, 2, 1]), np.array([60, 50, 40])
    assert assign_images(costs, full, [[0], [1], [1]], num_ranks=2, max_patches=90) == [0, 1, 1]


def test_a_share_of_ones_own():
    shown = [images(4, 2, name="a").select([0, 1, 0]), images()]
    ((first,), (second,)) = share_images(shown, encoding(balance=False))
    assert (first.media.images, first.index.tolist(), first.exchange) == ([b"a0", b"a1"], [0, 1, 0], None)
    assert second is None


def test_packed_bins_share_and_metrics_count():
    bins = [[sample(9, group=g, image=b"%d" % g) for g in range(4)], []]  # images of 8 patches
    p = packing()
    batches = pack_microbatch(bins, p)
    assert [batch.payload.vision[0].media.num_patches for batch in batches] == [16, 16]
    text = pack_microbatch([[sample(9)], []], p)
    alone = pack_microbatch(bins, packing(encoding=encoding(balance=False)))
    rounds = [[list(rank) for rank in zip(*microbatches, strict=True)] for microbatches in ([batches, text], [alone])]
    assert balance_metrics(rounds[:1]) == {
        "vision/patches": 32.0,
        "vision/patch_imbalance": 1.0,
        "vision/cost_imbalance": 1.0,
        "perf/token_imbalance": (32 + 8) / (18 + 6),  # 32 and 4 tokens, 8 and 4
    }
    assert balance_metrics(rounds)["vision/patch_imbalance"] == (16 + 32) / (16 + 16)
    assert balance_metrics([[[batch] for batch in text]])["vision/patch_imbalance"] == 1.0


def test_costs_count_multiplications():
    tower = TowerCost(hidden_size=10, num_layers=3, mlp_weights=700)
    assert tower(np.array([[2, 3, 4]])).tolist() == [3 * (24 * (400 + 700) + 2 * 10 * 2 * 12**2)]
    windowed = TowerCost(hidden_size=10, num_layers=3, mlp_weights=700, windowed_layers=2, window=2)
    # windows of 2 x 2, 2 x 2 and 1 x 2, 1 x 2 in each of two frames
    pairs = 2 * (1 * 12**2 + 2 * (2 * 16 + 2 * 4))
    assert windowed(np.array([[2, 3, 4]])).tolist() == [3 * 24 * 1100 + 2 * 10 * pairs]


def test_towers_of_qwen():
    assert tower_cost(Qwen2VLConfig()) == TowerCost(1280, 32, 2 * 4 * 1280**2)
    config = Qwen2_5_VLConfig(vision_config={"hidden_size": 1280})
    assert tower_cost(config) == TowerCost(1280, 32, 3 * 1280 * 3420, windowed_layers=28, window=8)
