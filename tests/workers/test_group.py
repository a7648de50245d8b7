"""What travels to the ranks."""

import pickle
from types import SimpleNamespace

import numpy as np

from megarl.data.packing import pack_microbatch
from megarl.workers.group import _RankActor, share_of, streams_of
from tests.data.test_packing import packing, sample
from tests.data.test_sharing import encoding


def test_an_image_travels_to_the_rank_that_decodes_it():
    images = [bytes([number]) * 50_000 for number in range(4)]
    samples = [sample(9, group=group, image=images[group]) for group in range(4) for _ in range(8)]
    bins = pack_microbatch([samples[:20], samples[20:]], packing(encoding=encoding(context_parallel_size=2)))
    shares = [[share_of(batch, context_parallel_rank=rank, decodes=True) for rank in range(2)] for batch in bins]
    sizes = [len(pickle.dumps(share)) for ranks in shares for share in ranks]
    assert all(50_000 < size < 55_000 for size in sizes), sizes
    assert all(len(pickle.dumps(streams_of(batch))) < 30_000 for batch in bins)
    for batch, ranks in zip(bins, shares, strict=True):
        for rank, share in enumerate(ranks):
            whole = _RankActor.with_share(SimpleNamespace(load=list), "load", [streams_of(batch)], [share])[0]
            assert whole.payload.vision[rank] is batch.payload.vision[rank]
            assert whole.payload.vision[1 - rank] is None
            assert whole.payload.tokens is batch.payload.tokens
            told = share_of(batch, context_parallel_rank=rank, decodes=False)
            assert len(pickle.dumps(told)) < 5_000
            assert told[rank].media.images == [b""] * len(batch.payload.vision[rank].media.images)
            np.testing.assert_array_equal(told[rank].media.grids, batch.payload.vision[rank].media.grids)
