"""Memory that is lent out between steps: it is really free meanwhile, and the steps are the same bits."""

import dataclasses

import pytest
import torch

from megarl.config import LoraConfig, ParallelConfig
from tests.workers.test_policy import config_of, minibatches_of, worker_of

PARTS = ["optimizer", "gradients", "parameters"]


def steps(config, num_steps, release):
    """Bits of all trained tensors after ``num_steps``, and the bytes that were freed before each but the first."""
    from megarl.utils.checksum import tensor_checksum

    worker = worker_of(config)
    minibatches, freed, empty = minibatches_of(config, worker), [], []
    for number in range(num_steps):
        if number and release:
            freed.append(worker.release(config.trainer.offload))
            assert worker.release(config.trainer.offload) == 0
            empty.append(left(worker, config.trainer.offload))
        worker.load(minibatches)
        worker.score()
        worker.train()
    state = {name: tensor_checksum(parameter) for name, parameter in worker.model.named_parameters()}
    for i, optimizer in enumerate(worker.optimizer.chained_optimizers):
        tensors = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        tensors += [tensor for values in optimizer.optimizer.state.values() for tensor in values.values()]
        state |= {f"{i}.{j}": tensor_checksum(tensor) for j, tensor in enumerate(tensors)}
    return state, freed, empty


def left(worker, parts):
    """Bytes still held by what was to be released, and by parameters where they were not."""
    inner = [optimizer.optimizer for optimizer in worker.optimizer.chained_optimizers]
    tensors = {
        "parameters": list(worker.model.parameters()),
        "gradients": [p.main_grad for p in worker.model.parameters() if p.requires_grad]
        + [buffer.grad_data for chunk in worker.ddp for buffer in chunk.buffers],
        "optimizer": [tensor for optimizer in inner for s in optimizer.state.values() for tensor in s.values()],
    }
    sizes = {name: sum(t.untyped_storage().nbytes() for t in tensors[name]) for name in tensors}
    return sum(sizes[part] for part in parts), sum(sizes[part] for part in tensors if part not in parts)


@pytest.mark.parametrize(
    ("parts", "dtype", "distributed", "lora"),
    [
        (PARTS, "float32", True, LoraConfig()),
        (PARTS, "bfloat16", True, LoraConfig(rank=2)),
        pytest.param(["optimizer", "gradients"], "bfloat16", False, LoraConfig(), marks=pytest.mark.slow),
        pytest.param(["parameters"], "float32", False, LoraConfig(rank=2), marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_same_bits(model, pool, parts, dtype, distributed, lora):
    parallel = ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=distributed)
    config = config_of(model, parallel, 2, False)
    config.model = dataclasses.replace(config.model, dtype=dtype, lora=lora)
    config.trainer.offload = parts
    expected = pool.run(steps, 2, config, 3, False)
    for (state, freed, empty), (plain, _, _) in zip(pool.run(steps, 2, config, 3, True), expected, strict=True):
        assert state == plain
        assert all(number > 0 for number in freed)
        assert [held for held, _ in empty] == [0, 0]
        assert all(others > 0 for _, others in empty) == (set(parts) != set(PARTS))


def saved_while_away(config, directory):
    """Weights and a checkpoint that are asked for while everything is released."""
    from megarl.checkpoint.export import export_to_rank_zero

    worker = worker_of(config)
    worker.load(minibatches_of(config, worker))
    worker.score()
    worker.train()
    before = {name: tensor.clone() for name, tensor in export_to_rank_zero(worker.model, worker.mappings)}
    worker.release(config.trainer.offload)
    worker.save_checkpoint(directory, 1, {})
    worker.finish_saving()
    worker.release(config.trainer.offload)
    worker.load_checkpoint(f"{directory}/step_000001")
    worker.release(config.trainer.offload)
    worker.write_hf(f"{directory}/hf")
    return before


def test_what_is_away_comes_back_when_it_is_asked_for(model, pool, tmp_path):
    from safetensors.torch import load_file

    config = config_of(model, ParallelConfig(), 1, False)
    config.trainer.offload = PARTS
    (before,) = pool.run(saved_while_away, 1, config, str(tmp_path))
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(written) == set(before)
    assert all(torch.equal(written[name], tensor) for name, tensor in before.items())
