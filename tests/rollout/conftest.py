"""One Ray cluster and one engine for all tests of the package: an engine takes half a minute to start."""

from types import SimpleNamespace

import pytest

from megarl.config import DebugConfig, ModelConfig, RolloutConfig, RunConfig, TrainerConfig


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two directories with the same shapes and different weights."""
    from tests.rollout.reference import write_model

    folder = tmp_path_factory.mktemp("rollout")
    return [write_model(folder / f"model_{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def processor(models):
    from megarl.data.processors import load_processor

    return load_processor(models[0])


@pytest.fixture(scope="session")
def cluster():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def pool(cluster, models):
    """A manager of one engine and the list of syncs that restarts asked for."""
    from megarl.rollout.manager import RolloutManager

    config = RunConfig(
        model=ModelConfig(path=str(models[0])),
        rollout=RolloutConfig(num_engines=1, max_restarts=1, timeout_s=60),
        trainer=TrainerConfig(placement="colocated"),  # an engine that can lend its memory
    )
    synced = []
    manager = RolloutManager(config, models[0], sync=synced.append)
    yield SimpleNamespace(manager=manager, engine=manager.engines[0], synced=synced)
    manager.shutdown()


@pytest.fixture(scope="module")
def deterministic_manager(cluster, models):
    """A manager of two engines that never served anything."""
    from megarl.rollout.manager import RolloutManager

    config = RunConfig(
        model=ModelConfig(path=str(models[0])),
        rollout=RolloutConfig(num_engines=2),
        debug=DebugConfig(deterministic=True),
    )
    manager = RolloutManager(config, models[0], sync=lambda engines: None)
    yield manager
    manager.shutdown()
