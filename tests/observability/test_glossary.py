"""docs/metrics.md and what runs log. tests/trainer/commands.py asks ``unexplained`` about every run that it reads."""

import re
from pathlib import Path

from megarl.observability.glossary import GLOSSARY, as_markdown, unexplained

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_the_glossary():
    assert (ROOT / "docs" / "metrics.md").read_text() == as_markdown() + "\n"


def test_every_metric_that_is_named_in_the_code_is_explained():
    sections = {names.split("/")[0] for section in GLOSSARY.values() for names in section}
    name = re.compile(rf'"((?:{"|".join(map(re.escape, sections))})/[a-z0-9_]+[a-z0-9])"')
    found = set()
    for path in (ROOT / "megarl").rglob("*.py"):
        found |= set(name.findall(path.read_text()))
    assert len(found) > 60
    endings = ("", "/mean", "_mean", "_abs_diff")  # a name of several statistics, or what they begin with
    assert not [one for one in found if all(unexplained({one + ending}) for ending in endings)]


def test_what_is_not_in_it_is_unexplained():
    given = {"critic/score/mean", "critic/score/median", "val-core/digits/score/mean@1", "timing_s/x", "new/thing"}
    assert unexplained(given) == {"critic/score/median", "new/thing"}
