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
