"""README's tables are what the benchmarks wrote."""

import json
from pathlib import Path

from benchmarks.parity import readme_table, table_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_parity_table_is_that_of_the_results():
    written = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("parity_*_cores.json")]
    assert readme_table((ROOT / "README.md").read_text()) in [table_of(results) for results in written]


def test_a_table_shows_the_worst_of_a_kind_and_leaves_out_what_was_refused():
    layouts = {
        "tp1": {"logits": 1e-7, "gradients": 2e-7},
        "tp2_sp": {"logits": 4e-7, "gradients": 3e-7},
        "tp2_pp2": {"logits": 2e-7, "gradients": 6e-7},
        "pp2_vpp2": {"refused": "no"},
    }
    table = table_of({"families": {"x": {"title": "X", "layouts": layouts}}}).splitlines()
    assert (
        table[0] == "| model | 1 rank | tensor | sequence | pipeline | interleaved | context | expert | data | logits |"
    )
    assert table[2] == "| X | 2e-07 | 6e-07 | 3e-07 | 6e-07 | - | - | - | - | 4e-07 |"
