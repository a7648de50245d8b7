"""Which rank and which engine runs on which GPU: decided once a run, from what the cluster has.

``plan`` is arithmetic on the GPUs of nodes and refuses what cannot be placed, with the node, GPUs wanted and GPUs free.
``placed`` reserves them as one Ray placement group, a bundle for each node, and says how Ray must start
every actor. The driver needs no GPU: nobody asks its torch.
"""

from __future__ import annotations

import ipaddress
import math
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from megarl.config import TRAINER_MEMORY, RunConfig
from megarl.launch.environment import nccl_environment, rank_environment
from megarl.types import Placement

_PROBE_TIMEOUT_S = 120.0  # for a process on each node to start
RESERVE_TIMEOUT_S = 20.0  # the plan fits what is free: Ray needs seconds, unless somebody else was faster


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str  # Ray's
    address: str
    gpus: int  # all of them, 0 on a node for the CPU
    free: int  # those that nothing has reserved
    cpus: int = 1


@dataclass
class Plan:
    """GPUs as (index of the node, index among the GPUs taken there); on a CPU the second is 0."""

    kind: str  # colocated | split
    nodes: list[Node]
    ranks: list[tuple[int, int]]
    engines: list[list[tuple[int, int]]] = field(default_factory=list)  # one place a tensor-parallel rank

    @property
    def on_gpus(self) -> bool:
        return any(node.gpus for node in self.nodes)

    def taken(self, node: int) -> int:
        """GPUs that the run takes on a node."""
        places = self.ranks + [place for engine in self.engines for place in engine]
        return max((index + 1 for where, index in places if where == node), default=0) if self.on_gpus else 0


def plan(config: RunConfig, nodes: list[Node], *, engines: bool = True) -> Plan:
    """Place the ranks of ``config``, and unless ``engines`` is False its engines, on ``nodes``.

    Raises ``ValueError`` that names the key, the node, the GPUs wanted and those free.
    """
    if not any(node.gpus for node in nodes):
        return _plan_cpu(config, nodes, engines)
    nodes = [node for node in nodes if node.gpus]
    kind = _kind(config, nodes) if engines else "split"
    share = _ranks_per_node(config, nodes, kind, engines)
    chosen = _trainer_nodes(config, nodes, share)
    ranks = [(node, gpu) for node in chosen for gpu in range(share)]
    result = Plan(kind, nodes, ranks)
    if engines:
        result.engines = _engines(config, result, share)
    return result


def _plan_cpu(config: RunConfig, nodes: list[Node], engines: bool) -> Plan:
    wanted = config.trainer.num_nodes
    if wanted > len(nodes):
        raise ValueError(f"trainer.num_nodes={wanted}: the cluster has {len(nodes)} node(s){_table(nodes)}")
    share = config.world_size // wanted
    count = (config.rollout.num_engines or 1) if engines else 0
    kind = "split" if config.trainer.placement == "auto" else config.trainer.placement
    places = [[(index * wanted // count, 0)] * config.rollout.tensor_parallel_size for index in range(count)]
    return Plan(kind, nodes, [(rank // share, 0) for rank in range(config.world_size)], places)


def _kind(config: RunConfig, nodes: list[Node]) -> str:
    """Engines share the ranks' GPUs unless both work at the same time, or more engines are asked for than fit there."""
    asked, rollout, trainer = config.trainer.placement, config.rollout, config.trainer
    if asked != "auto":
        return asked
    if trainer.max_staleness:
        return "split"
    if trainer.ranks_per_node and rollout.num_engines:
        fit = trainer.num_nodes * (trainer.ranks_per_node // rollout.tensor_parallel_size)
        return "colocated" if rollout.num_engines <= fit else "split"
    return "colocated"


def _ranks_per_node(config: RunConfig, nodes: list[Node], kind: str, engines: bool) -> int:
    """GPUs of each of ``trainer.num_nodes`` nodes that ranks have."""
    parallel, trainer = config.parallel, config.trainer
    if trainer.ranks_per_node:
        share = trainer.ranks_per_node
    else:
        # as many as the fullest of the nodes that are needed has, in whole replicas of the model
        free = sorted((node.free for node in nodes), reverse=True)[: trainer.num_nodes]
        room = min(free)
        tensor = config.rollout.tensor_parallel_size
        if kind == "split" and engines and trainer.num_nodes >= sum(node.free >= tensor for node in nodes):
            wanted = -(-config.rollout.num_engines // trainer.num_nodes) * tensor
            room -= wanted or max(tensor, room // 2 // tensor * tensor)
        whole = parallel.smallest_world // math.gcd(parallel.smallest_world, trainer.num_nodes)
        if trainer.num_nodes > 1:
            whole = math.lcm(whole, parallel.tensor_model_parallel_size * parallel.context_parallel_size)
        share = max(room // whole * whole, whole)
    group = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if trainer.num_nodes > 1 and share % group:
        raise ValueError(
            f"trainer.ranks_per_node={share} does not hold whole groups of parallel.tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size} x parallel.context_parallel_size={parallel.context_parallel_size} "
            f"ranks, which must not be split over nodes{_table(nodes)}"
        )
    return share


def _trainer_nodes(config: RunConfig, nodes: list[Node], share: int) -> list[int]:
    """The first ``trainer.num_nodes`` nodes with ``share`` free GPUs."""
    fitting = [index for index, node in enumerate(nodes) if node.free >= share]
    if len(fitting) < config.trainer.num_nodes:
        raise ValueError(
            f"the ranks need {share} free GPU(s) on each of {config.trainer.num_nodes} node(s) (trainer.num_nodes, "
            f"trainer.ranks_per_node and the sizes in parallel); {len(fitting)} node(s) have them{_table(nodes)}"
        )
    return fitting[: config.trainer.num_nodes]


def _engines(config: RunConfig, result: Plan, share: int) -> list[list[tuple[int, int]]]:
    """Engines on neighbouring GPUs of one node each: the ranks' own when colocated, else those that ranks left."""
    size, nodes = config.rollout.tensor_parallel_size, result.nodes
    hosts = sorted({node for node, _ in result.ranks})
    if result.kind == "colocated":
        room, key = dict.fromkeys(hosts, (0, share)), "of the ranks"
    else:
        room, key = {i: (share if i in hosts else 0, node.free) for i, node in enumerate(nodes)}, "that ranks leave"
    places = [
        [(node, start + k) for k in range(size)]
        for node, (first, end) in room.items()
        for start in range(first, end - size + 1, size)
    ]
    wanted = config.rollout.num_engines or len(places)
    if not places or wanted > len(places):
        raise ValueError(
            f"trainer.placement={result.kind}: rollout.num_engines={wanted or 1} with rollout.tensor_parallel_size="
            f"{size} need {(wanted or 1) * size} GPU(s) {key}, {size} of one node for an engine; there is room for "
            f"{len(places)} engine(s) beside {len(result.ranks)} rank(s){_table(nodes)}"
        )
    return places[:wanted]


def _table(nodes: list[Node]) -> str:
    """What each node has, for messages."""
    return "".join(f"\n  node {node.address}: {node.free} of {node.gpus} GPU(s) free" for node in nodes)


def cluster_nodes() -> list[Node]:
    """The living nodes of the connected cluster in order of their addresses."""
    free = ray._private.state.available_resources_per_node()  # there is no public call that tells nodes apart
    nodes = [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            gpus=int(node["Resources"].get("GPU", 0)),
            free=int(free.get(node["NodeID"], {}).get("GPU", 0)),
            cpus=int(node["Resources"].get("CPU", 1)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (_address_key(node.address), node.id))


def _address_key(address: str) -> tuple[int, str]:
    try:
        return int(ipaddress.ip_address(address)), address
    except ValueError:
        return 0, address


@ray.remote(num_cpus=0)
class _Probe:
    """Tells what Ray gave to a bundle."""

    def gpus(self) -> list[str]:
        """Of the bundle, as ``CUDA_VISIBLE_DEVICES`` names them, in their order."""
        names = [str(name) for name in ray.get_gpu_ids()]
        return sorted(names, key=lambda name: (int(name) if name.isdigit() else 0, name))

    def memory(self) -> int | None:
        """Bytes of the smallest of them, None where neither the driver nor torch says it."""
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run([*query, f"--id={','.join(self.gpus())}"], capture_output=True, text=True, check=True)
            return min(int(line) << 20 for line in said.stdout.split())
        except (OSError, subprocess.CalledProcessError, ValueError):
            devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
            return min((torch.cuda.get_device_properties(i).total_memory for i in devices), default=None)


@contextmanager
def placed(config: RunConfig, *, engines: bool = True) -> Iterator[tuple[RunConfig, Placement]]:
    """Reserve GPUs for a run on the connected cluster; the configuration with what was left open, and the placement.

    Leaving gives the GPUs back. ``engines``: False where only ranks are needed.
    """
    nodes = cluster_nodes()
    decided = plan(config, nodes, engines=engines)
    if not decided.on_gpus:
        config = _resolved(config, decided)
        yield config, _on_cpu(decided)
        return
    config = _resolved(config, decided)
    group, hosts = _reserve(decided)
    try:
        gpus, memory = _which_gpus(decided, group, hosts)
        yield config, _on_gpus(config, decided, group, hosts, gpus, memory)
    finally:
        remove_placement_group(group)


def _resolved(config: RunConfig, decided: Plan) -> RunConfig:
    """``config`` with the keys that ask for a choice, and whatever contradicts the plan refused by name."""
    colocated, transport = decided.kind == "colocated", config.weight_sync.transport
    if config.trainer.max_staleness and colocated:
        raise ValueError("trainer.max_staleness needs trainer.placement=split: colocated ranks and engines take turns")
    one_node = len({node for node, _ in decided.ranks} | {n for e in decided.engines for n, _ in e}) == 1
    near = colocated if decided.on_gpus else one_node
    if transport == "tensor" and decided.engines and not near:
        where = "the same GPU" if decided.on_gpus else "one node"
        raise ValueError(
            f"weight_sync.transport=tensor needs rank and engine on {where}; with trainer.placement={decided.kind} use "
            "broadcast or disk (auto chooses)"
        )
    if transport == "broadcast" and decided.on_gpus and colocated:
        raise ValueError(
            "weight_sync.transport=broadcast: NCCL has no group with a rank and an engine on the same GPU; with "
            "trainer.placement=colocated use tensor or disk (auto chooses)"
        )
    release = config.rollout.release
    kept = {"weights", "kv_cache"} - set(release)
    if colocated and decided.on_gpus and kept and release != ["auto"]:
        raise ValueError(
            f"rollout.release={list(release)}: colocated engines must lend {' and '.join(sorted(kept))} "
            "too, or the ranks have no room to train (trainer.placement=split keeps them apart)"
        )
    if transport == "auto":
        transport = "tensor" if near else "broadcast"
    share = len(decided.ranks) // config.trainer.num_nodes
    offload = list(config.trainer.offload)
    if offload == ["auto"]:
        offload = list(TRAINER_MEMORY) if colocated and decided.engines and decided.on_gpus else []
    return replace(
        config,
        trainer=replace(config.trainer, placement=decided.kind, ranks_per_node=share, offload=offload),
        rollout=replace(config.rollout, num_engines=len(decided.engines) or config.rollout.num_engines),
        weight_sync=replace(config.weight_sync, transport=transport),
    )


def _on_cpu(decided: Plan) -> Placement:
    """One node needs no word to Ray; on several, ranks and engines stay where the plan has them."""
    several = len(decided.nodes) > 1

    def options(place: tuple[int, int]) -> dict[str, Any]:
        affinity = NodeAffinitySchedulingStrategy(decided.nodes[place[0]].id, soft=False)
        return {"scheduling_strategy": affinity} if several else {}

    return Placement(
        kind=decided.kind,
        device="cpu",
        rank_options=[options(place) for place in decided.ranks],
        engine_options=[options(places[0]) for places in decided.engines],
        lines=_lines(decided, None),
    )


def _reserve(decided: Plan) -> tuple[PlacementGroup, list[int]]:
    """A bundle of GPUs on each node that the plan uses, and the nodes in order of their bundles."""
    hosts = [index for index in range(len(decided.nodes)) if decided.taken(index)]
    group = placement_group(
        [{"GPU": decided.taken(index)} for index in hosts],
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": decided.nodes[index].id} for index in hosts],
    )
    if not group.wait(RESERVE_TIMEOUT_S):
        remove_placement_group(group)
        wanted = sum(decided.taken(index) for index in hosts)
        raise ValueError(
            f"Ray did not reserve {wanted} GPU(s) in {RESERVE_TIMEOUT_S:g} s: somebody else took some meanwhile"
            f"{_table(cluster_nodes())}"
        )
    return group, hosts


def _which_gpus(
    decided: Plan, group: PlacementGroup, hosts: list[int]
) -> tuple[dict[tuple[int, int], str], int | None]:
    """The GPU of each place, as ``CUDA_VISIBLE_DEVICES`` names it; bytes of the smallest, None where nobody tells."""
    probes = [
        _Probe.options(
            num_gpus=decided.taken(host), scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)
        ).remote()
        for bundle, host in enumerate(hosts)
    ]
    names = ray.get([probe.gpus.remote() for probe in probes], timeout=_PROBE_TIMEOUT_S)
    sizes = ray.get([probe.memory.remote() for probe in probes], timeout=_PROBE_TIMEOUT_S)
    for probe in probes:
        ray.kill(probe)
    gpus = {(host, index): name for host, here in zip(hosts, names, strict=True) for index, name in enumerate(here)}
    return gpus, min((size for size in sizes if size is not None), default=None)


def _on_gpus(
    config: RunConfig,
    decided: Plan,
    group: PlacementGroup,
    hosts: list[int],
    gpus: dict[tuple[int, int], str],
    memory: int | None,
) -> Placement:
    """Actors ask Ray for no GPU of their own: the bundles hold them, and an engine's process must see all of its."""

    def options(places: list[tuple[int, int]], env: dict[str, str]) -> dict[str, Any]:
        visible = ",".join(gpus[place] for place in places)
        env = env | {"CUDA_VISIBLE_DEVICES": visible, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        node = decided.nodes[places[0][0]]
        # Ray would give one thread to an actor that asks for no core
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, node.cpus // node.gpus)))
        bundle = PlacementGroupSchedulingStrategy(group, hosts.index(places[0][0]))
        return {"num_gpus": 0, "scheduling_strategy": bundle, "runtime_env": {"env_vars": env}}

    rank_at = {place: rank for rank, place in enumerate(decided.ranks)}
    colocated = decided.kind == "colocated"
    return Placement(
        kind=decided.kind,
        device="cuda",
        rank_options=[options([place], rank_environment(config, os.environ)) for place in decided.ranks],
        engine_options=[options(places, nccl_environment(os.environ)) for places in decided.engines],
        sources=[[rank_at[place] for place in places] for places in decided.engines] if colocated else [],
        gpu_bytes=memory,
        lines=_lines(decided, gpus),
    )


def _lines(decided: Plan, gpus: dict[tuple[int, int], str] | None) -> list[str]:
    """A line a node: which ranks and engines it has, on which GPUs."""
    lines = []
    for index, node in enumerate(decided.nodes):
        ranks = [rank for rank, (where, _) in enumerate(decided.ranks) if where == index]
        engines = [engine for engine, places in enumerate(decided.engines) if places[0][0] == index]
        if not ranks and not engines:
            lines.append(f"node {node.address}: idle, {node.free} of {node.gpus} GPU(s) free")
            continue
        text = []
        for name, members, places in (
            ("rank", ranks, [decided.ranks[rank] for rank in ranks]),
            ("engine", engines, [place for engine in engines for place in decided.engines[engine]]),
        ):
            if members:
                on = "" if gpus is None else f" on GPU {_ranges([gpus[place] for place in places])}"
                text.append(f"{name}{'s' * (len(members) > 1)} {_ranges(members)}{on}")
        lines.append(f"node {node.address}: {', '.join(text)}")
    return lines


def _ranges(numbers: list[Any]) -> str:
    """0, 1, 2, 5 as 0-2,5; what is no number as it is."""
    if not all(str(number).isdigit() for number in numbers):
        return ",".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
