"""A step of supervised training on conversations with images: transformers' loss and gradients on the same labels."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from megarl.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainerConfig
from megarl.types import Prompt
from tests.models.parity import assert_near, joined

IMAGE = {"type": "image"}


def picture(height: int, width: int) -> bytes:
    out = BytesIO()
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def rows_of(processor):
    """Three answers about three images, and one about none."""
    from megarl.data.conversations import Conversations

    def turn(role, *parts):
        return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}

    shown = [
        turn("system", "You are a helpful assistant."),
        turn("user", IMAGE, "What is the sum?"),
        turn("assistant", "1+2=3"),
        turn("user", "What digits are in this image?", IMAGE, IMAGE),
        turn("assistant", "4,5,6"),
        turn("user", "Yes?"),
        turn("assistant", "9"),
    ]
    told = [turn("user", "1,2,3?"), turn("assistant", "1+2+3=6")]
    images = [picture(28, 56), picture(56, 84), picture(30, 30)]
    lay_out = Conversations(processor).lay_out
    return [lay_out(Prompt("0", "rows", shown, images)), lay_out(Prompt("1", "rows", told))]


def step(config):
    """On a rank: what the totals say of a step on the rows, and this rank's shards of the gradients."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from megarl.algorithms.weights import compute_loss_weights
    from megarl.data.packing import Packing, pack_bins
    from megarl.types import Sample
    from megarl.workers.policy import PolicyWorker

    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(config.model.path, trainable=True)
    samples = [
        Sample(
            prompt=row.prompt,
            group_id=group,
            loss_mask=row.loss_mask,
            rollout_logprobs=np.zeros(len(row.tokens), np.float32),
            tokens=row.tokens,
            media=row.media,
        )
        for group, row in enumerate(rows_of(worker.processor))
    ]
    for sample, weights in zip(samples, compute_loss_weights(samples, config.algorithm), strict=True):
        sample.loss_weights = weights
    bins = pack_bins(samples, Packing.of(config, worker.processor), config.data_parallel_size)
    worker.load([bins[ps.get_data_parallel_rank()]])
    totals = worker.train()
    gradients = {worker.model.global_name(name): p.main_grad.clone() for name, p in worker.model.named_parameters()}
    return totals, {"tensor": ps.get_tensor_model_parallel_rank(), "gradients": gradients}


@pytest.fixture(scope="module")
def expected(model):
    """Transformers' mean loss over the trained tokens, its gradients, and the share of them that it would choose."""
    import torch
    from transformers import AutoModelForImageTextToText

    from megarl.data.processors import load_processor
    from megarl.families import family_of

    processor = load_processor(model)
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    rows = rows_of(processor)
    count, loss, right = sum(int(row.loss_mask.sum()) for row in rows), 0.0, 0
    for row in rows:
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        labels = tokens.masked_fill(~torch.from_numpy(row.loss_mask), -100)
        inputs = {"mm_token_type_ids": (tokens == processor.image_token_id).int()}
        if row.media.images:
            inputs |= {
                "pixel_values": processor.pixel_values(row.media),
                "image_grid_thw": torch.from_numpy(row.media.grids),
            }
        output = reference(input_ids=tokens, labels=labels, num_items_in_batch=count, **inputs)
        output.loss.backward()
        loss += float(output.loss)
        right += int((output.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
    canonical_name = family_of(reference.config).canonical_name
    gradients = {canonical_name(n): p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return loss, gradients, right / count


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)], ids=["1", "tp2"])
@pytest.mark.parametrize("room", [512, 84], ids=["packed", "apart"])
def test_loss_and_gradients_equal_transformers(model, pool, expected, layout, room):
    from megarl.workers.group import merge

    config = RunConfig(
        model=ModelConfig(path=str(model)),
        parallel=layout,
        optimizer=OptimizerConfig(clip_grad=1e6),
        algorithm=AlgorithmConfig(policy_loss="sft"),
        trainer=TrainerConfig(max_tokens_per_microbatch=room),
    )
    results = pool.run(step, config.world_size, config)
    metrics = merge([totals for totals, _ in results if totals is not None])
    loss, gradients, accuracy = expected
    assert metrics["actor/pg_loss"] == metrics["train/token_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["train/token_accuracy"] == pytest.approx(accuracy)
    assert_near(joined([shards for _, shards in results], "gradients", str(model)), gradients)
