"""Take adapters out of a checkpoint, or add them to the model that they adapt.

    python tools/convert/adapters.py extract CHECKPOINT OUT_DIR
    python tools/convert/adapters.py merge HF_DIR ADAPTER_DIR OUT_DIR [--dtype bfloat16] [--no-logits]

`extract` writes a PEFT directory, `merge` a Hugging Face directory with parity.json. One tensor of the model at a time
is in memory, but for the comparison of logits with transformers, which holds the whole model.
"""

import argparse
import sys

from megarl.checkpoint.convert import FILE_DTYPES, megatron_to_peft, merge_adapters


def main() -> int:
    """Exit status 0 when it is what was asked for, 1 when a merged model is not, 2 when nothing was converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    extract = commands.add_parser("extract", help="a checkpoint's adapters as a PEFT directory")
    extract.add_argument("checkpoint", metavar="CHECKPOINT")
    extract.add_argument("out_dir", metavar="OUT_DIR")
    merge = commands.add_parser("merge", help="a model with a PEFT directory's adapters added")
    merge.add_argument("hf_dir", metavar="HF_DIR")
    merge.add_argument("adapter_dir", metavar="ADAPTER_DIR")
    merge.add_argument("out_dir", metavar="OUT_DIR")
    merge.add_argument("--dtype", choices=sorted(FILE_DTYPES), help="of the files; default: the model's")
    merge.add_argument("--no-logits", action="store_true", help="compare tensors only")
    a = parser.parse_args()
    try:
        if a.command == "extract":
            print(f"{a.out_dir}: {megatron_to_peft(a.checkpoint, a.out_dir)} tensors")
            return 0
        report = merge_adapters(a.hf_dir, a.adapter_dir, a.out_dir, dtype=a.dtype, logits=not a.no_logits)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logits = report["logits"]
    print(f"{a.out_dir}: {report['keys']['compared']} tensors, {report['adapted_modules']} with adapters added")
    print(f"logits of the adapted model against the files: {logits.get('skipped') or logits['max_abs_diff']}")
    print("\n".join([f"verdict: {report['verdict']}", *report["problems"]]))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
