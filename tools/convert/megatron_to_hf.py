"""Convert a Megatron checkpoint to a Hugging Face directory.

    python tools/convert/megatron_to_hf.py CHECKPOINT OUT_DIR [--dtype bfloat16] [--no-logits]

parity.json in OUT_DIR says how the written files compare with the checkpoint. One parameter at a time is in memory, but
for the comparison of logits with transformers, which holds the whole model.
"""

import argparse
import sys

from megarl.checkpoint.convert import FILE_DTYPES, megatron_to_hf


def main() -> int:
    """Exit status 0 when the files are the checkpoint, in bits and logits, 1 when not, 2 when nothing was converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out_dir", metavar="OUT_DIR")
    parser.add_argument("--dtype", choices=sorted(FILE_DTYPES), help="of the files; default: the checkpoint's")
    parser.add_argument("--no-logits", action="store_true", help="compare tensors only")
    arguments = parser.parse_args()
    try:
        report = megatron_to_hf(
            arguments.checkpoint, arguments.out_dir, dtype=arguments.dtype, logits=not arguments.no_logits
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logits = report["logits"]
    print(f"{arguments.out_dir}: {report['keys']['compared']} tensors of step {report['step']} in {report['dtype']}")
    print(
        f"logits of the checkpoint against the files in transformers: {logits.get('skipped') or logits['max_abs_diff']}"
    )
    print("\n".join([f"verdict: {report['verdict']}", *report["problems"]]))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
