"""docs/configurations.md, what megarl does with a config.json: ``python -m tests.models.config_tables`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from megarl.config import ParallelConfig
from megarl.families import family_of
from megarl.models.common.language import longest_sequence
from tests.models.config_fields import MODELS, section
from tests.models.published import PUBLISHED, published

FILE = Path(__file__).resolve().parents[2] / "docs/configurations.md"
TENSOR_SIZES = (1, 2, 4, 5, 8)
HEAD = """# Configurations

What megarl does with a config.json, written by `python -m tests.models.config_tables`.

## Published models

`parallel.tensor_model_parallel_size` of 1, 2, 4, 5 and 8. Ranks share out the query heads; of keys and values there may
be fewer groups than ranks, when one number divides the other. Vocabularies are padded to what the ranks divide.

The longest sequence is the one up to which megarl's logits are transformers': a sliding window that a sequence fits
does not change it (the rollout engine has no windows in these models), and behind `original_max_position_embeddings`
longrope turns by other frequencies. A run whose `data.max_prompt_length` and `rollout.max_new_tokens` are more is
refused before anything starts; supervised training drops longer rows.
"""
FIELDS = """
## Fields

Each field of a small model of each kind, changed alone: the logits of megarl against those of transformers, relative
difference at most 1e-5. Refused is by name, before anything starts. Dynamic positions have no effect on sequences that
are not longer than `max_position_embeddings`; the rollout engine stretches those too, so a run with engines is refused.
"""


def _refusal(name: str, size: int) -> str | None:
    """What is against ``size`` tensor-parallel ranks; None: nothing."""
    hf = published(name)
    try:
        parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=size > 1)
        family_of(hf).validate(hf, parallel)
    except ValueError as error:
        return str(error)
    return None


def published_row(name: str) -> str:
    refusals = {size: _refusal(name, size) for size in TENSOR_SIZES}
    accepted = [str(size) for size, refusal in refusals.items() if refusal is None]
    if not accepted:
        against = re.sub(r" one of .*", " one of megarl's", refusals[1])
        return f"| {name} | none | | {against} |"
    # of several the first; 5 is there for what it divides
    against = next((f"{size}: {refusals[size]}" for size in (2, 4, 8) if refusals[size] is not None), "")
    tokens, field = longest_sequence(published(name).get_text_config())
    return f"| {name} | {', '.join(accepted)} | {tokens} (`{field}`) | {against} |"


def published_table() -> str:
    """Of each published model the tensor-parallel sizes that it takes, and why not others."""
    lines = ["| model | tensor-parallel sizes | longest sequence | refused |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(published_row, PUBLISHED)])


def document(sections: list[str]) -> str:
    """The file, of the ``section`` of every model."""
    return "\n".join([HEAD, published_table(), FIELDS, "\n\n".join(sections), ""])


if __name__ == "__main__":
    FILE.write_text(document([section(model) for model in MODELS]))
