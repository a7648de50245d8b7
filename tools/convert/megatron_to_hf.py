"""Convert a Megatron checkpoint to a Hugging Face directory.

    python tools/convert/megatron_to_hf.py CHECKPOINT OUT_DIR [--dtype bfloat16]

parity.json in OUT_DIR says how the written files compare with the checkpoint.
"""

import argparse
import sys

from megarl.checkpoint.convert import megatron_to_hf


def main() -> int:
    """Exit status 0 when a directory was written, 2 when nothing could be converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out_dir", metavar="OUT_DIR")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the files; default: the checkpoint's")
    arguments = parser.parse_args()
    try:
        report = megatron_to_hf(arguments.checkpoint, arguments.out_dir, dtype=arguments.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logits = report["logits"]
    print(f"{arguments.out_dir}: {report['keys']['compared']} tensors of step {report['step']} in {report['dtype']}")
    print(
        f"logits of the checkpoint against the files in transformers: {logits.get('skipped') or logits['max_abs_diff']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
