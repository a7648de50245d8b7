"""Run as a program: places runs on a real Ray cluster of pretended nodes and GPUs, and prints as JSON where things are.

usage: placements.py [--all] GPUS,GPUS,... CASE ...   A node for each number, the first is the driver's. CASES below.
Only the first and the last rank and engine of a case are started, with ``--all`` every one.
"""

import json
import os
import sys
import time

import ray
from ray.cluster_utils import Cluster

from megarl.config import ParallelConfig, RolloutConfig, RunConfig, TrainerConfig
from megarl.launch.placement import cluster_nodes, placed


def run_of(tensor=1, engine_tensor=1, num_engines=0, **trainer):
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        rollout=RolloutConfig(tensor_parallel_size=engine_tensor, num_engines=num_engines),
        trainer=TrainerConfig(**trainer),
    )


CASES = {
    "colocated": run_of(tensor=2, engine_tensor=2),
    "split": run_of(tensor=2, placement="split"),
    "staleness": run_of(max_staleness=1),
    "two_nodes": run_of(tensor=2, engine_tensor=2, num_nodes=2),
    "engines_elsewhere": run_of(tensor=2, engine_tensor=4, num_nodes=1, placement="split"),
    "all_nodes": run_of(tensor=4, engine_tensor=4, num_nodes=8),
    "one": run_of(ranks_per_node=1),
    "too_many": run_of(tensor=16),
    "wide_engine": run_of(engine_tensor=16),
    "beside_another_job": run_of(tensor=2, num_nodes=2, ranks_per_node=4),
}


class Who:
    def where(self):
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def place(name: str, index: dict[str, int], everyone: bool) -> dict:
    """Where the actors of a case are as (node, visible GPUs), or why it is refused."""
    start, actor = time.monotonic(), ray.remote(Who)
    try:
        with placed(CASES[name]) as (config, placement):
            ranks, engines = placement.rank_options, placement.engine_options
            if not everyone:
                ranks, engines = [ranks[0], ranks[-1]], [engines[0], engines[-1]]
            options = [*ranks, *engines]
            actors = [actor.options(**({"num_cpus": 0} | chosen)).remote() for chosen in options]
            found = [(index[node], gpus) for node, gpus in ray.get([a.where.remote() for a in actors], timeout=60)]
            for a in actors:
                ray.kill(a)
            return {
                "kind": placement.kind,
                "device": placement.device,
                "world": config.world_size,
                "num_engines": config.rollout.num_engines,
                "transport": config.weight_sync.transport,
                "offload": list(config.trainer.offload),
                "ranks": found[: len(ranks)],
                "engines": found[len(ranks) :],
                "visible": [o["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] for o in placement.rank_options],
                "sources": placement.sources,
                "nccl": [o["runtime_env"]["env_vars"]["NCCL_CUMEM_ENABLE"] for o in (ranks[0], engines[0])],
                "lines": placement.lines,
                "seconds": time.monotonic() - start,
            }
    except ValueError as error:
        return {"refused": str(error), "seconds": time.monotonic() - start}


def main() -> None:
    everyone, (numbers, *names) = sys.argv[1] == "--all", [a for a in sys.argv[1:] if a != "--all"]
    gpus = [int(number) for number in numbers.split(",")]
    cluster = Cluster(initialize_head=False)
    for number in gpus:
        cluster.add_node(num_cpus=2, num_gpus=number, object_store_memory=80 << 20, include_dashboard=False)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    # nodes of one machine have one address, so their order is that of their ids
    index = {node.id: number for number, node in enumerate(node for node in cluster_nodes() if node.gpus)}
    results = {}
    for name in names:
        others = []
        if name == "beside_another_job":  # which holds five of the GPUs, on the second of the nodes with some
            target = next(node for node, number in index.items() if number == 1)
            hold = ray.remote(Who).options(num_cpus=0, num_gpus=5, label_selector={"ray.io/node-id": target})
            others = [hold.remote()]
            ray.get(others[0].where.remote(), timeout=60)
        results[name] = place(name, index, everyone)
        for other in others:
            ray.kill(other)
        while sum(node.free for node in cluster_nodes()) < sum(gpus):  # all is given back, sooner or later
            time.sleep(0.1)
    print(json.dumps(results))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
