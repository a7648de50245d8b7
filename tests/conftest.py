"""What every test process needs before torch is imported, and the fixtures that more than one package uses."""

import os
import re

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

pytest_plugins = ["tests.distributed"]  # the fixture `pool`: gloo ranks that live as long as the session


def asks_for_gpu(expression: str) -> bool:
    """Whether ``-m expression`` selects tests because they are marked ``gpu``."""
    return re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", expression)) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all other tests: their gloo ranks would all take the first one, and test something else."""
    if asks_for_gpu(config.option.markexpr):
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at CUDA that leaves fork possible
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)  # when -m has taken out what is not wanted
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where no CUDA device is seen."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only now: collecting the other tests should not cost its import

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        reason = "no CUDA device" + (": they are hidden unless pytest is asked for -m gpu" if hidden else "")
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
