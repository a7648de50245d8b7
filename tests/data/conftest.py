import pytest

from examples import tiny_models
from megarl.data.processors import load_processor


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny_qwen"
    tiny_models.qwen2_5_vl(path, seed=0)
    return path


@pytest.fixture(scope="session")
def processor(tiny_qwen):
    return load_processor(tiny_qwen)


@pytest.fixture(scope="session")
def generations(tiny_qwen, tmp_path_factory):
    """Directories of a tiny model of each Qwen-VL generation, by model_type."""
    folder = tmp_path_factory.mktemp("generations")
    tiny_models.qwen2_vl(folder / "qwen2_vl")
    tiny_models.qwen3_vl(folder / "qwen3_vl")
    return {"qwen2_vl": folder / "qwen2_vl", "qwen2_5_vl": tiny_qwen, "qwen3_vl": folder / "qwen3_vl"}
