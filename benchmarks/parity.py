"""Every model family against transformers on every parallel layout: logits and the gradients of all parameters.

    python benchmarks/parity.py [--seed N] [--families a,b] [--layouts x,y]      run, print, write results and README
    python benchmarks/parity.py --readme                                        write README's table from the results

Models are small and random: the seed draws their sizes, heads, windows, tied embeddings. Text alone, text beside
images, several images of odd sizes and videos stand in four packed microbatches; one optimizer step on gloo ranks.
Figures are the worst norm of a difference, relative to the norm of what transformers says, over microbatches or
parameters. Writes benchmarks/results/parity_<cores>_cores.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results" / f"parity_{os.cpu_count()}_cores.json"
BEGIN, END = "<!-- parity: written by benchmarks/parity.py -->", "<!-- /parity -->"
COLUMNS = {  # of README's table: what a layout must have for its figures to count
    "1 rank": "tp1",
    "tensor": "tp",
    "sequence": "sp",
    "pipeline": "pp",
    "interleaved": "vpp",
    "context": "cp",
    "expert": "ep",
    "data": "dp",
}


def measure(seed: int, families: list[str], layouts: list[str]) -> dict[str, Any]:
    """``{family: {layout: {"logits", "gradients"} or {"refused"}}}``, printed as it comes."""
    sys.path.insert(0, str(ROOT))
    from megarl.families import family_of  # heavy: README's table needs none of them
    from tests.distributed import Pool
    from tests.models.families import FAMILIES
    from tests.models.parity import ALL_LAYOUTS, MICROBATCHES, differences, joined, logit_differences, run
    from tests.models.reference import reference

    for name, names, choices in (("families", families, FAMILIES), ("layouts", layouts, ALL_LAYOUTS)):
        if unknown := sorted(set(names) - set(choices)):
            raise SystemExit(f"--{name}: {', '.join(unknown)} not among {', '.join(choices)}")
    table: dict[str, Any] = {}
    pool = Pool()
    print(f"{'':16s}{'':22s}{'logits':>10s}{'gradients':>11s}")
    try:
        for family in families or FAMILIES:
            case = FAMILIES[family]
            config = case.draw(seed)
            table[family] = {"title": case.title or family, "architecture": config.architectures[0], "layouts": {}}
            with tempfile.TemporaryDirectory() as directory:
                ref = reference(case, f"seed{seed}", Path(directory))
                for layout in layouts or ALL_LAYOUTS:
                    try:
                        family_of(config).validate(config, ALL_LAYOUTS[layout][1])
                    except ValueError as error:
                        table[family]["layouts"][layout] = {"refused": str(error)}
                        print(f"{family:16s}{layout:22s}   {error}")
                        continue
                    results = run(pool, ref, layout)
                    logits = max(logit_differences(results, ref, MICROBATCHES))
                    gradients = max(differences(joined(results, "gradients", ref.directory), ref.gradients).values())
                    table[family]["layouts"][layout] = {"logits": logits, "gradients": gradients}
                    print(f"{family:16s}{layout:22s}{logits:10.1e}{gradients:11.1e}", flush=True)
    finally:
        pool.close()
    return table


def table_of(results: dict[str, Any]) -> str:
    """README's table: the worst gradient of the layouts that have a column's kind of parallelism, and the logits."""
    lines = ["| model | " + " | ".join(COLUMNS) + " | logits |", "|---" * (len(COLUMNS) + 2) + "|"]
    for family in results["families"].values():
        ran = {name: figures for name, figures in family["layouts"].items() if "gradients" in figures}
        cells = []
        for part in COLUMNS.values():
            worst = [
                f["gradients"]
                for name, f in ran.items()
                if part in {p.rstrip("0123456789") for p in name.split("_")} | {name}
            ]
            cells.append(f"{max(worst):.0e}" if worst else "-")
        logits = max(figures["logits"] for figures in ran.values())
        lines.append(f"| {family['title']} | " + " | ".join(cells) + f" | {logits:.0e} |")
    return "\n".join(lines)


def readme_table(text: str) -> str:
    """What stands between the markers."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def write_readme(results: dict[str, Any]) -> None:
    text = README.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{README} has no lines {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table_of(results)}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="", help="of tests/models/families.py; all when left out")
    parser.add_argument("--layouts", default="", help="of tests/models/parity.py; all when left out")
    parser.add_argument("--readme", action="store_true", help="write README's table from the results, run nothing")
    arguments = parser.parse_args()
    if not arguments.readme:
        families, layouts = (
            [name for name in given.split(",") if name] for given in (arguments.families, arguments.layouts)
        )
        table = measure(arguments.seed, families, layouts)
        if families or layouts:
            return  # a part is looked at, not kept
        versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        results = {"seed": arguments.seed, "versions": versions, "families": table}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_readme(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
