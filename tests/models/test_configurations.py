"""docs/configurations.md is what ``python -m tests.models.config_tables`` says, and no field is silently wrong."""

import pytest

from tests.models.config_fields import MODELS, section, unlisted
from tests.models.config_tables import FIELDS, FILE, HEAD, published_table


def test_published_models_are_accepted_or_refused_as_documented():
    assert FILE.read_text().startswith("\n".join([HEAD, published_table(), FIELDS])), (
        "python -m tests.models.config_tables"
    )


def test_every_field_of_every_kind_is_changed_or_skipped_and_none_is_wrong():
    for model in MODELS:
        assert unlisted(model) == [], model
        assert f"### {model}\n" in FILE.read_text()
    assert "WRONG" not in FILE.read_text()


@pytest.mark.parametrize(
    "model", [m if m in ("phi3", "qwen2") else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_fields_come_to_what_is_documented(model):
    assert f"{section(model)}\n" in FILE.read_text(), "python -m tests.models.config_tables"
