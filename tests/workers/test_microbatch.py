"""Images on their way to a rank: decoded by threads, once for the ranks that share them, on the device for a pass."""

import threading

import numpy as np

from megarl.config import ParallelConfig
from tests.workers.test_policy import config_of, minibatches_of, worker_of


def decoding_of(config) -> dict:
    """On a rank: who decodes in a step, the pixels of its microbatches, and what the group is sent of them."""
    import torch.distributed as dist

    worker = worker_of(config)
    decoded, patches, sent, broadcast = [], worker.processor.patches, [], dist.broadcast

    def noting(data, grid):
        decoded.append((data, threading.current_thread().name))
        return patches(data, grid)

    worker.processor.patches = noting
    minibatches = minibatches_of(config, worker)
    worker.estimate([batch for bins in minibatches for batch in bins])
    worker.load(minibatches)
    flat = [m for minibatch in worker.microbatches for m in minibatch]
    held = sum(m.inputs.vision.pixel_values.numel() for m in flat)
    dist.broadcast = lambda tensor, **options: sent.append(str(tensor.dtype)) or broadcast(tensor, **options)
    pixels = [m.inputs.shown().pixel_values.numpy() for m in flat]
    dist.broadcast = broadcast
    worker.score()
    worker.train()
    left = len(worker.kind.pixels.decoded)
    worker.processor.patches = patches
    expected = [worker.processor.pixel_values(b.payload.vision[0].media).numpy() for bins in minibatches for b in bins]
    return {
        "decoded": decoded,
        "held": held,
        "left": left,
        "sent": sent,
        "pixels": pixels,
        "expected": expected,
    }


def test_one_rank_decodes_each_image_once_a_step_in_threads(model, pool):
    """However many passes show it, those of ``estimate`` included."""
    config = config_of(model, ParallelConfig(tensor_model_parallel_size=2), 2, False, {"kl_placement": "reward"})
    first, second = pool.run(decoding_of, 2, config)
    images = [data for data, _ in first["decoded"]]
    assert len(images) == len(set(images)) == 3
    assert all(name.startswith("decode") for _, name in first["decoded"])
    assert second["decoded"] == []
    for rank in (first, second):
        assert rank["held"] == 0  # pixels are there for a pass, not for the step
        assert rank["left"] == 0
        assert rank["sent"] == ["torch.uint8"] * len(rank["pixels"])
        for ours, expected in zip(rank["pixels"], rank["expected"], strict=True):
            np.testing.assert_array_equal(ours, expected)


def broken_image(config) -> str:
    """What a step says of an image that cannot be decoded."""
    worker = worker_of(config)
    minibatches = minibatches_of(config, worker)

    def fails(data, grid):
        raise ValueError("cannot decode the PNG image")

    worker.processor.patches = fails
    worker.load(minibatches)  # the threads fail, the step has not asked yet
    try:
        worker.score()
    except ValueError as error:
        return str(error)
    return ""


def test_an_image_that_cannot_be_decoded_is_named(model, pool):
    config = config_of(model, ParallelConfig(), 1, False)
    (message,) = pool.run(broken_image, 1, config)
    assert message.startswith("image 0 of ")
    assert "cannot decode the PNG image" in message
