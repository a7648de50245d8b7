"""A step of the real worker on a skewed batch: ranks decode and encode each image once, and train as one rank does."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from megarl.config import AlgorithmConfig, ModelConfig, ParallelConfig, RunConfig, TrainerConfig
from tests.models.parity import assert_near, joined

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
LAYOUTS = {
    "one rank": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp2, unshared": (2, {"balance_vision": False}),
    "tp2 dp2": (4, TP2),
    "pp2 dp2": (4, PP2),
    "cp2 dp2": (4, CP2),
    "cp2 dp2, unshared": (4, CP2 | {"balance_vision": False}),
}
# images (height, width) of each prompt, and how many samples it has
PROMPTS = [([(140, 112), (112, 112), (84, 140), (112, 84), (56, 56), (28, 28)], 1), ([], 2), ([(56, 84)], 4), ([], 3)]
NUM_IMAGES = 7


def png(height: int, width: int, seed: int) -> bytes:
    out = BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def samples_of(processor):
    """Made-up responses, log-probs and advantages."""
    from megarl.types import Prompt, Sample

    random, samples = np.random.default_rng(0), []
    for group, (sizes, count) in enumerate(PROMPTS):
        content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "What digits are in this image?"}]
        images = [png(*size, seed=10 * group + number) for number, size in enumerate(sizes)]
        encoded = processor.encode(Prompt(f"t/train/{group}", "t", [{"role": "user", "content": content}], images))
        for _ in range(count):
            tokens = np.concatenate([encoded.tokens, random.integers(0, 256, random.integers(2, 9))]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(encoded.tokens)
            samples.append(
                Sample(
                    prompt=encoded.prompt,
                    group_id=group,
                    loss_mask=mask,
                    rollout_logprobs=(-random.random(len(tokens)) * mask).astype(np.float32),
                    advantages=(random.normal() * mask).astype(np.float32),
                    tokens=tokens,
                    media=encoded.media,
                )
            )
    return samples


def train_once(path, world_size, parallel):
    """On a rank: its shards of the gradients, the images that it decoded, and those of each microbatch."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megarl.algorithms.weights import compute_loss_weights
    from megarl.data.packing import Packing, assign_to_bins, pack_assigned
    from megarl.workers.policy import PolicyWorker

    config = RunConfig(
        model=ModelConfig(path=str(path)),
        parallel=ParallelConfig(use_distributed_optimizer=False, **parallel),
        algorithm=AlgorithmConfig(kl_coef=0.1),
        trainer=TrainerConfig(ranks_per_node=world_size, max_tokens_per_microbatch=200),
    )
    worker = PolicyWorker(config, dist.get_rank())
    worker.prepare()
    worker.build(str(path), trainable=True)
    patches, decoded = worker.processor.patches, []
    worker.processor.patches = lambda data, grid: decoded.append(len(data)) or patches(data, grid)
    samples = samples_of(worker.processor)
    for sample, weights in zip(samples, compute_loss_weights(samples, config.algorithm), strict=True):
        sample.loss_weights = weights
    packing = Packing.of(config, worker.processor)
    bins = assign_to_bins(samples, packing, config.data_parallel_size)
    worker.load([pack_assigned(samples, bins, packing)[parallel_state.get_data_parallel_rank()]])
    worker.score()
    worker.train()
    named = [(worker.model.global_name(name), p) for name, p in worker.model.named_parameters()]
    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "gradients": {name: p.main_grad.clone() for name, p in named},
        "decoded": decoded,
        "shown": [
            {len(image) for indices in microbatch for i in indices for image in samples[i].media.images}
            for microbatch in zip(*bins, strict=True)
        ],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from examples.tiny_models import qwen2_5_vl

    path = tmp_path_factory.mktemp("models") / "tiny"
    qwen2_5_vl(path, seed=3, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def one_rank(model, pool):
    return pool.run(train_once, 1, model, *LAYOUTS["one rank"])


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_a_skewed_step_is_that_of_one_rank(model, pool, one_rank, layout):
    results = pool.run(train_once, LAYOUTS[layout][0], model, *LAYOUTS[layout])
    expected = joined(one_rank, "gradients", str(model))
    assert_near(joined(results, "gradients", str(model)), expected, 1e-5)
    assert any(gradient.any() for name, gradient in expected.items() if name.startswith("visual."))
    assert len(set().union(*one_rank[0]["shown"])) == NUM_IMAGES
    shown = sorted(size for sizes in results[0]["shown"] for size in sizes)
    # the first tensor-parallel rank of a first stage decodes for all of its group
    ranks = [result["decoded"] for result in results if (result["tensor"], result["stage"]) == (0, 0)]
    if "unshared" not in layout:
        assert sorted(size for decoded in ranks for size in decoded) == shown
        assert all(ranks)
    assert not any(result["decoded"] for result in results if result["stage"] or result["tensor"])
