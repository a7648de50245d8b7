"""Checkpoints of a run: resuming is exact, at the same layout bit for bit, and what is not complete does not count."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint.huggingface import CheckpointError
from megarl.checkpoint.manifest import MANIFEST_FILE, latest, prune, read_manifest, set_aside
from megarl.config import LoraConfig
from tests.distributed import RankError
from tests.models.reference import Reference

NONE = LoraConfig()
LORA = LoraConfig(rank=3, parts=["vision_tower", "projector", "decoder"])
MEANWHILE = {"ddp": {"overlap_grad_reduce": True}}  # buckets of their own size
# name -> ranks, (tensor, pipeline, context, virtual pipeline), fields of ModelConfig, of ParallelConfig
CASES = {
    "tp2_dp2_overlap": (4, (2, 1), {}, MEANWHILE),
    "tp2_pp2": (4, (2, 2), {}, {}),
    "pp2_dp2_bf16": (4, (1, 2), {"dtype": "bfloat16"}, {}),
    "tp2_whole_optimizer": (2, (2, 1), {}, {"use_distributed_optimizer": False}),
    "pp2_frozen_decoder": (2, (1, 2), {"freeze": ["decoder"]}, {}),
    "tp2_cp2": (4, (2, 1, 2), {}, {}),
    "pp2_vpp2": (2, (1, 2, 1, 2), {}, {}),
    "tp2_dp2_ep2": (4, (2, 1, 1, 0, 2), {}, MEANWHILE),
    "tp2_dp2_lora": (4, (2, 1), {"lora": LORA}, {}),
    "pp2_lora_of_the_tower": (2, (1, 2), {"lora": LoraConfig(rank=2, parts=["vision_tower"])}, {}),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """``references(name, family)``: the directory and the samples of a tiny model, made once."""
    from tests.checkpoint.training import tiny

    return cache(lambda name, family="qwen2_5_vl": tiny(name, tmp_path_factory.mktemp(name), family=family))


def case_config(case: str, reference: Reference):
    from tests.checkpoint.training import run_config

    _, layout, model, parallel = CASES[case]
    config = run_config(reference.directory, layout, **model)
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


def straight(case: str, reference: Reference, directory: str) -> tuple:
    """Three steps; after the second an asynchronous save that the third runs beside."""
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import fingerprint, step
    from tests.models.training import build

    trainable = build(case_config(case, reference))
    losses = [step(trainable, reference, noisy=True) for _ in range(2)]
    handle = megatron.save(
        megatron.step_directory(directory, 2),
        2,
        trainable.model,
        trainable.optimizer,
        trainable.scheduler,
        {"position": 7},
        trainable.config,
        async_save=True,
    )
    losses.append(step(trainable, reference, noisy=True))
    marks = fingerprint(trainable)
    handle.wait()
    return losses, marks


def resumed(case: str, reference: Reference, path: str) -> tuple:
    """Other initial weights and seeds, the checkpoint over them, one step."""
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import fingerprint, step
    from tests.models.training import build

    trainable = build(case_config(case, reference), weights=False, seed=99)
    extra = megatron.load(path, trainable.model, trainable.optimizer, trainable.scheduler)
    loss = step(trainable, reference, noisy=True)
    return extra, loss, fingerprint(trainable)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "tp2_dp2_ep2" else ()) for case in CASES]
)
def test_resume_is_bit_equal(pool, references, tmp_path, case):
    world_size = CASES[case][0]
    names = {"vpp2": ("deep_tied",), "ep2": ("mixed", "qwen3_vl_moe")}
    reference = references(*names.get(case.rpartition("_")[2], ("gqa2_tied",)))
    without_stop = pool.run(straight, world_size, case, reference, str(tmp_path))
    path = latest(tmp_path)
    assert path == tmp_path / "step_000002"
    with_stop = pool.run(resumed, world_size, case, reference, str(path))
    for (losses, marks), (extra, loss, resumed_marks) in zip(without_stop, with_stop, strict=True):
        assert losses[2] != losses[1]
        assert extra == {"position": 7}
        assert loss == losses[2]
        assert resumed_marks == marks
    manifest = read_manifest(path)
    held = "adapters" if "lora" in case else "model"
    assert manifest.contents == [held, "optimizer", "scheduler", "rng"]
    assert manifest.world_size == world_size
    assert sum(name.startswith("rng/") for name in manifest.files) == world_size
    assert {"hf/config.json", "extra.json", "config.yaml", "state/.metadata"} <= set(manifest.files)


def continue_at(
    reference: Reference, layout: tuple[int, ...], path: str, num_steps: int, lora: LoraConfig
) -> list[float]:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    trainable = build(run_config(reference.directory, layout, lora=lora), weights=not path, seed=5)
    if path:
        megatron.load(path, trainable.model, trainable.optimizer, trainable.scheduler)
    return [step(trainable, reference) for _ in range(num_steps)]


def one_step(trainable, reference: Reference) -> dict:
    """Loss and gradients of a step, and the parameters it leads to."""
    from megatron.core import parallel_state as ps

    from tests.checkpoint.training import step

    loss = step(trainable, reference)
    named = [(trainable.model.global_name(name), p) for name, p in trainable.model.named_parameters()]
    return {
        "tensor": ps.get_tensor_model_parallel_rank(),
        "expert": ps.get_expert_model_parallel_rank(),
        "loss": loss,
        "gradients": {name: p.main_grad.clone() for name, p in named},
        "updated": {name: p.detach().clone() for name, p in named},
    }


def save_and_go_on(reference: Reference, layout: tuple[int, ...], directory: str) -> dict:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    t = build(run_config(reference.directory, layout))
    for _ in range(2):
        step(t, reference)
    megatron.save(megatron.step_directory(directory, 2), 2, t.model, t.optimizer, t.scheduler, {}, t.config)
    return one_step(t, reference)


def generators() -> dict[str, str]:
    """Checksums of the states of this rank's random generators."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megarl.utils.checksum import tensor_checksum

    states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    return {name: tensor_checksum(state) for name, state in states.items()}


def load_and_go_on(reference: Reference, layout: tuple[int, ...], path: str) -> dict:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config
    from tests.models.training import build

    t = build(run_config(reference.directory, layout), weights=False, seed=5)
    before = generators()
    megatron.load(path, t.model, t.optimizer, t.scheduler)
    assert generators() == before  # those in the checkpoint are of ranks of another layout
    return one_step(t, reference)


def train_and_save(
    reference: Reference, layout: tuple[int, ...], directory: str, num_steps: int, lora: LoraConfig | None = None
) -> list[float]:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    trainable = build(run_config(reference.directory, layout, lora=lora or LoraConfig()))
    losses = [step(trainable, reference) for _ in range(num_steps)]
    t = trainable
    megatron.save(
        megatron.step_directory(directory, num_steps), num_steps, t.model, t.optimizer, t.scheduler, {}, t.config
    )
    return losses


@pytest.mark.parametrize(
    ("family", "name", "lora", "saved", "loaded"),
    [
        ("qwen2_5_vl", "gqa4_untied", NONE, (4, (2, 2)), [(2, (1, 1))]),
        ("qwen2_5_vl", "deep_tied", NONE, (2, (1, 2, 1, 2)), [(1, (1, 1)), (4, (2, 1, 2))]),
        ("qwen2_5_vl", "deep_tied", LORA, (4, (2, 2)), [(1, (1, 1)), (2, (1, 2, 1, 2))]),
        pytest.param(
            *("qwen3_vl_moe", "sparse", NONE, (4, (2, 1, 1, 0, 4)), [(1, (1, 1)), (4, (1, 2, 1, 0, 2))]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_layout_continues_with_the_same_losses(pool, references, tmp_path, family, name, lora, saved, loaded):
    reference = references(name, family)
    expected = pool.run(continue_at, 1, reference, (1, 1), "", 5, lora)[0]
    first = pool.run(train_and_save, saved[0], reference, saved[1], str(tmp_path), 3, lora)[0]
    assert first == pytest.approx(expected[:3], rel=1e-5)
    for world_size, layout in loaded:
        losses = pool.run(continue_at, world_size, reference, layout, str(latest(tmp_path)), 2, lora)[0]
        assert losses == pytest.approx(expected[3:], rel=2e-5), layout


@pytest.mark.parametrize(
    ("family", "name", "saved", "loaded"),
    [
        ("qwen2_5_vl", "deep_tied", (4, (2, 2)), [(1, (1, 1)), (2, (2, 1)), (4, (4, 1)), (4, (1, 4))]),
        ("qwen2_5_vl", "gqa4_untied", (4, (2, 2)), [(2, (1, 2))]),
        ("qwen3_vl", "seed0", (4, (2, 2)), [(1, (1, 1))]),
        # 3 and 2 ranks pad its vocabulary to other sizes; 4 have two groups of keys and values
        ("text", "six_heads", (3, (3, 1)), [(2, (2, 1)), (1, (1, 1))]),
        ("text", "six_heads", (2, (2, 1)), [(3, (3, 1))]),
        ("text", "qwen2_untied", (4, (4, 1)), [(2, (2, 1))]),
    ],
)
def test_ranks_save_and_any_layout_takes_the_same_step(pool, references, tmp_path, family, name, saved, loaded):
    """As if it had not stopped: loss, gradients, and what the optimizer makes of them with the moments it was given."""
    from tests.models.parity import assert_near, joined

    reference = references(name, family)
    expected = pool.run(save_and_go_on, saved[0], reference, saved[1], str(tmp_path))
    for world_size, layout in loaded:
        results = pool.run(load_and_go_on, world_size, reference, layout, str(latest(tmp_path)))
        assert results[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5), layout
        for key in ("gradients", "updated"):
            theirs = joined(expected, key, reference.directory)
            assert_near(joined(results, key, reference.directory), theirs, 1e-5)


def write_and_die(reference: Reference, directory: str, victim: int) -> None:
    """A complete save of step 1, then one of step 2 in which the rank ``victim`` is killed half way."""

    from megarl.checkpoint import megatron, writer
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    t = build(run_config(reference.directory, (2, 1)))
    step(t, reference)

    class Deadly(writer.SnapshotWriter):
        def write(self):
            self._items = self._items[: len(self._items) // 2]
            super().write()
            os.kill(os.getpid(), signal.SIGKILL)

    megatron.save(megatron.step_directory(directory, 1), 1, t.model, t.optimizer, t.scheduler, {}, t.config).wait()
    if dist.get_rank() == victim:
        writer.SnapshotWriter = Deadly
    megatron.save(
        megatron.step_directory(directory, 2), 2, t.model, t.optimizer, t.scheduler, {}, t.config, async_save=True
    ).wait()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_while_saving_the_previous_checkpoint_stays_the_latest(pool, references, tmp_path, caplog, victim):
    with pytest.raises(RankError, match=f"rank {victim}: the process ended with exit code -9"):
        pool.run(write_and_die, 2, references("gqa2_tied"), str(tmp_path), victim)
    assert (tmp_path / "step_000002" / "state").is_dir()
    assert latest(tmp_path) == tmp_path / "step_000001"
    assert "step_000002 was interrupted before it was complete: ignored" in caplog.text
    # the run resumes, comes to step 2 again and replaces what is there
    pool.run(train_and_save, 2, references("gqa2_tied"), (2, 1), str(tmp_path), 2)
    assert latest(tmp_path) == tmp_path / "step_000002"


def fail_on_a_rank(reference: Reference, directory: str) -> tuple[str, bool]:

    from megarl.checkpoint import megatron, writer
    from tests.checkpoint.training import run_config, step
    from tests.models.training import build

    t = build(run_config(reference.directory, (2, 1)))
    step(t, reference)

    class Full(writer.SnapshotWriter):
        def write(self):
            raise OSError(28, "No space left on device")

    original = writer.SnapshotWriter
    try:
        if dist.get_rank() == 1:
            writer.SnapshotWriter = Full
        handle = megatron.save(
            megatron.step_directory(directory, 1), 1, t.model, t.optimizer, t.scheduler, {}, t.config, async_save=True
        )
        handle.wait()
    except CheckpointError as error:
        return str(error), (Path(directory) / "step_000001" / MANIFEST_FILE).exists()
    finally:
        writer.SnapshotWriter = original
    return "", True


def test_a_rank_that_cannot_write_fails_the_save_on_all(pool, references, tmp_path):
    results = pool.run(fail_on_a_rank, 2, references("gqa2_tied"), str(tmp_path))
    assert [complete for _, complete in results] == [False, False]
    assert all("No space left on device" in message for message, _ in results)
    assert "rank 1" in results[0][0]


def load_error(reference: Reference, path: str, with_optimizer: bool) -> str:
    from megarl.checkpoint import megatron
    from tests.checkpoint.training import run_config
    from tests.models.training import build

    t = build(run_config(reference.directory, (1, 1)))
    try:
        megatron.load(path, t.model, *((t.optimizer, t.scheduler) if with_optimizer else ()))
    except CheckpointError as error:
        return str(error)
    return ""


def test_damage_is_named(pool, references, tmp_path):
    tied, untied = references("gqa2_tied"), references("gqa4_untied")
    pool.run(train_and_save, 1, tied, (1, 1), str(tmp_path), 1)
    path = latest(tmp_path)

    def error(change, reference=tied, with_optimizer=True) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        change(copy)
        message = pool.run(load_error, 1, reference, str(copy), with_optimizer)[0]
        shutil.rmtree(copy)
        return message

    def flip(copy: Path) -> None:
        """One bit among the tensors."""
        file = copy / "state" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    assert error(lambda copy: None) == ""
    assert "state/__0_0.distcp is missing" in error(lambda copy: (copy / "state" / "__0_0.distcp").unlink())
    assert "common.pt has 3 bytes, not" in error(lambda copy: (copy / "state" / "common.pt").write_bytes(b"abc"))
    assert "it has no manifest.json" in error(lambda copy: (copy / MANIFEST_FILE).unlink())
    assert "state/__0_0.distcp has other content than when it was saved" in error(flip)
    other = error(lambda copy: None, reference=untied, with_optimizer=False)
    assert "missing: language_model.output_layer.weight" in other
    assert "wrong shape: language_model.decoder.final_layernorm.weight is [32] in the checkpoint and [64]" in other
    pool.run(train_and_save, 1, untied, (1, 1), str(tmp_path / "untied"), 1)
    more = pool.run(load_error, 1, tied, str(latest(tmp_path / "untied")), False)[0]
    assert "unknown: language_model.output_layer.weight is in the checkpoint and not in the model" in more


def complete(directory: Path, step: int, *, manifest: bool = True) -> Path:
    path = directory / f"step_{step:06d}"
    (path / "state").mkdir(parents=True)
    if manifest:
        (path / MANIFEST_FILE).write_text(json.dumps({}))
    return path


def test_prune_keeps_the_newest_complete_and_what_is_being_written(tmp_path):
    for step in (1, 2, 4, 5):
        complete(tmp_path, step)
    complete(tmp_path, 3, manifest=False)
    complete(tmp_path, 6, manifest=False)
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == tmp_path / "step_000005"
    assert prune(tmp_path, 0) == []
    removed = prune(tmp_path, 2, protect=tmp_path / "step_000001")
    assert [path.name for path in removed] == ["step_000002", "step_000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "step_000001",
        "step_000004",
        "step_000005",
        "step_000006",
    ]


def test_a_run_that_goes_back_keeps_what_it_leaves(tmp_path):
    for step in (1, 2, 3):
        complete(tmp_path, step)
    for again in ("", "_2"):  # and once more
        names = [f"abandoned_step_00000{step}{again}" for step in (2, 3)]
        assert [path.name for path in set_aside(tmp_path, 1)] == names
        assert latest(tmp_path) == tmp_path / "step_000001"
        for step in (2, 3):
            complete(tmp_path, step)
    assert [path.name for path in prune(tmp_path, 1)] == ["step_000001", "step_000002"]
    assert (tmp_path / "abandoned_step_000003" / MANIFEST_FILE).is_file()


def test_latest_of_nothing(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None


def test_snapshot_is_not_changed_by_the_next_step(tmp_path):
    """The writer holds copies: without them an asynchronous save would store the next step's weights."""
    from torch.distributed.checkpoint import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import SavePlan

    from megarl.checkpoint.writer import SnapshotWriter

    for copy, expected in ((True, 1.0), (False, 2.0)):
        tensor = torch.ones(3)
        planner = DefaultSavePlanner()
        planner.set_up_planner({"w": tensor}, is_coordinator=True)
        plan: SavePlan = planner.create_local_plan()
        writer = SnapshotWriter(tmp_path, copy=copy)
        plan = writer.prepare_global_plan([plan])[0]
        writer.prepare_write_data(plan, planner)
        tensor.add_(1)
        (result,) = writer.write()
        assert result.size_in_bytes > 0
        stored = torch.load(tmp_path / "__0_0.distcp", weights_only=True)
        assert float(stored[0]) == expected
