"""Who runs where: the plan as arithmetic, and what Ray makes of it on a cluster of pretended nodes and GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config import ParallelConfig, RolloutConfig, RunConfig, TrainerConfig, WeightSyncConfig
from megarl.launch.placement import Node, _lines, _resolved, plan

ROOT = Path(__file__).resolve().parents[2]


def nodes(*free, gpus=8):
    return [Node(f"id{i}", f"10.0.0.{i + 1}", gpus, number) for i, number in enumerate(free)]


def run_of(
    *, tensor=1, pipeline=1, context=1, engine_tensor=1, num_engines=0, transport="auto", release=None, **trainer
):
    return RunConfig(
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
        ),
        rollout=RolloutConfig(
            tensor_parallel_size=engine_tensor,
            num_engines=num_engines,
            **({} if release is None else {"release": release}),
        ),
        weight_sync=WeightSyncConfig(transport=transport),
        trainer=TrainerConfig(**trainer),
    )


@pytest.mark.parametrize(
    ("config", "free", "kind", "world", "engines"),
    [
        (run_of(), [1], "colocated", 1, [[(0, 0)]]),
        (run_of(tensor=2), [8], "colocated", 8, [[(0, i)] for i in range(8)]),
        (
            run_of(engine_tensor=4),
            [8],
            "colocated",
            8,
            [[(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (0, 5), (0, 6), (0, 7)]],
        ),
        (run_of(tensor=2, placement="split"), [8], "split", 4, [[(0, i)] for i in range(4, 8)]),
        (run_of(max_staleness=1), [8], "split", 4, [[(0, i)] for i in range(4, 8)]),
        (run_of(ranks_per_node=4, num_engines=4), [8], "colocated", 4, [[(0, i)] for i in range(4)]),
        (run_of(ranks_per_node=2, num_engines=4), [8], "split", 2, [[(0, i)] for i in range(2, 6)]),
        # the only node with 8 free GPUs has the ranks, engines find their neighbours on the others
        (run_of(placement="split", engine_tensor=4), [4, 8, 3], "split", 8, [[(0, 0), (0, 1), (0, 2), (0, 3)]]),
        (run_of(tensor=4, num_nodes=8), [8] * 8, "colocated", 64, [[(n, i)] for n in range(8) for i in range(8)]),
        # another job's GPUs: whole tensor-parallel groups of what is left on both nodes
        (run_of(tensor=2, num_nodes=2), [8, 7], "colocated", 12, [[(n, i)] for n in range(2) for i in range(6)]),
        (run_of(placement="split"), [8, 0], "split", 4, [[(0, i)] for i in range(4, 8)]),
        (run_of(tensor=3), [8], "colocated", 6, [[(0, i)] for i in range(6)]),  # whole replicas
        (
            run_of(tensor=8, pipeline=2, num_nodes=2),
            [8, 8],
            "colocated",
            16,
            [[(n, i)] for n in (0, 1) for i in range(8)],
        ),
    ],
)
def test_plan(config, free, kind, world, engines):
    decided = plan(config, nodes(*free))
    assert (decided.kind, len(decided.ranks), decided.engines) == (kind, world, engines)
    assert len(set(decided.ranks)) == world
    group = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    for start in range(0, world, group):  # on one node, neighbours
        (host,) = {node for node, _ in decided.ranks[start : start + group]}
        first = decided.ranks[start][1]
        assert decided.ranks[start : start + group] == [(host, first + k) for k in range(group)]
    resolved = _resolved(config, decided)
    assert resolved.world_size == world
    assert resolved.rollout.num_engines == len(engines)
    assert resolved.weight_sync.transport == ("tensor" if kind == "colocated" else "broadcast")
    assert bool(resolved.trainer.offload) == (kind == "colocated")


@pytest.mark.parametrize(
    ("config", "free", "words"),
    [
        (run_of(tensor=16), [8, 8], ["16 free GPU", "10.0.0.1: 8 of 8", "10.0.0.2: 8 of 8"]),
        (run_of(tensor=2, num_nodes=2, ranks_per_node=8), [8, 7], ["trainer.num_nodes", "10.0.0.2: 7 of 8"]),
        (run_of(), [0], ["1 free GPU", "10.0.0.1: 0 of 8"]),
        (run_of(engine_tensor=16), [8], ["rollout.tensor_parallel_size=16", "16 of one node", "10.0.0.1: 8 of 8"]),
        (run_of(ranks_per_node=4, num_engines=9, placement="split"), [8], ["rollout.num_engines=9", "room for 4"]),
        (run_of(placement="colocated", num_engines=9), [8], ["rollout.num_engines=9", "room for 8"]),
        (run_of(tensor=4, num_nodes=2, ranks_per_node=6), [8, 8], ["trainer.ranks_per_node=6", "split over nodes"]),
        (run_of(context=3, num_nodes=3, ranks_per_node=8), [8] * 3, ["parallel.context_parallel_size=3"]),
        (run_of(tensor=8, num_nodes=2), [8, 4], ["8 free GPU", "10.0.0.2: 4 of 8"]),
    ],
)
def test_what_cannot_be_placed_is_refused_with_node_wanted_and_free(config, free, words):
    with pytest.raises(ValueError, match=r"(?s).*") as refusal:
        plan(config, nodes(*free))
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (run_of(placement="split", transport="tensor"), "weight_sync.transport=tensor"),
        (run_of(transport="broadcast"), "weight_sync.transport=broadcast"),
        (run_of(release=["kv_cache"]), "rollout.release=.*weights too"),
    ],
)
def test_a_transport_that_the_placement_rules_out_is_refused(config, key):
    with pytest.raises(ValueError, match=key):
        _resolved(config, plan(config, nodes(8)))


def test_a_cpu_cluster_runs_as_the_parallel_sizes_say():
    decided = plan(run_of(tensor=2, num_engines=2), nodes(0, gpus=0))
    assert (decided.kind, len(decided.ranks), len(decided.engines), decided.on_gpus) == ("split", 2, 2, False)
    resolved = _resolved(run_of(tensor=2), plan(run_of(tensor=2), nodes(0, gpus=0)))
    assert (resolved.weight_sync.transport, resolved.trainer.offload, resolved.rollout.num_engines) == ("tensor", [], 1)
    with pytest.raises(ValueError, match=r"rollout\.release=\['kv_cache'\]: .*trainer\.placement=split they keep"):
        _resolved(run_of(release=["kv_cache"]), plan(run_of(), nodes(0, gpus=0)))
    two = run_of(num_nodes=2, num_engines=2)
    assert _resolved(two, plan(two, nodes(0, 0, gpus=0))).weight_sync.transport == "broadcast"
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2: the cluster has 1"):
        plan(two, nodes(0, gpus=0))


def test_a_person_reads_what_is_where():
    decided = plan(run_of(tensor=2, engine_tensor=2), nodes(8, 8))
    gpus = {(node, index): str(index) for node in range(2) for index in range(8)}
    assert _lines(decided, gpus) == [
        "node 10.0.0.1: ranks 0-7 on GPU 0-7, engines 0-3 on GPU 0-7",
        "node 10.0.0.2: idle, 8 of 8 GPU(s) free",
    ]


def on_ray(*arguments):
    """What ``placements.py`` prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "RAY_USAGE_STATS_ENABLED": "0"}
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    command = [sys.executable, str(Path(__file__).with_name("placements.py")), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name, result in results.items():  # pytest -s shows them
        text = result.get("refused") or "\n".join(result["lines"])
        print(f"{arguments} {name} in {result['seconds']:.1f} s: {result.get('kind', 'refused')}\n{text}")
    return results


def test_ray_starts_ranks_and_engines_where_the_plan_has_them():
    """The driver's node has no GPU, two others have eight each."""
    names = ["colocated", "split", "two_nodes", "beside_another_job", "too_many", "wide_engine"]
    placed = on_ray("0,8,8", *names)
    assert all(result["seconds"] < 30 for result in placed.values())
    one = placed["colocated"]
    assert (one["world"], one["num_engines"], one["device"], one["transport"]) == (8, 4, "cuda", "tensor")
    assert one["offload"] == ["optimizer", "gradients", "parameters", "reference"]
    assert one["visible"] == list("01234567")
    assert one["nccl"] == ["0", "0"]  # the same on both sides
    assert one["ranks"] == [[0, "0"], [0, "7"]]
    assert one["engines"] == [[0, "0,1"], [0, "6,7"]]
    assert one["sources"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # two nodes are there: ranks take one, engines the other
    apart = placed["split"]
    assert (apart["ranks"], apart["engines"]) == ([[0, "0"], [0, "7"]], [[1, "0"], [1, "7"]])
    assert (apart["transport"], apart["sources"], apart["offload"]) == ("broadcast", [], [])
    both = placed["two_nodes"]
    assert (both["ranks"], both["engines"]) == ([[0, "0"], [1, "7"]], [[0, "0,1"], [1, "6,7"]])
    # five GPUs of the second node are somebody else's
    assert "3 of 8 GPU(s) free" in placed["beside_another_job"]["refused"]
    assert "16 free GPU" in placed["too_many"]["refused"]
    assert "rollout.tensor_parallel_size=16" in placed["wide_engine"]["refused"]


@pytest.mark.slow
def test_every_actor_of_a_node_and_of_eight_nodes():
    for numbers, name, world in (("1", "one", 1), ("8", "split", 4), ("8", "colocated", 8)):
        result = on_ray("--all", numbers, name)[name]
        engines = [gpus.split(",") for _, gpus in result["engines"]]
        assert len(result["ranks"]) == world
        assert [gpus for _, gpus in result["ranks"]] == [str(i) for i in range(world)]
        taken = [gpu for gpus in engines for gpu in gpus]
        assert taken == [str(i) for i in (range(4, 8) if result["kind"] == "split" else range(world))]
    result = on_ray("8," * 7 + "8", "all_nodes")["all_nodes"]
    assert (result["world"], result["num_engines"]) == (64, 16)
    assert result["visible"] == list("01234567") * 8
    assert result["ranks"] == [[0, "0"], [7, "7"]]
    assert result["engines"] == [[0, "0,1,2,3"], [7, "4,5,6,7"]]
