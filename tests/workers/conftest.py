"""One tiny model for all tests of the package."""

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from examples.tiny_models import qwen2_5_vl

    path = tmp_path_factory.mktemp("models") / "tiny"
    qwen2_5_vl(path, seed=3, num_hidden_layers=4)
    return path
