"""Convert a Hugging Face directory to a Megatron checkpoint.

    python tools/convert/hf_to_megatron.py HF_DIR OUT_DIR [--no-logits] [parallel.tensor_model_parallel_size=2 ...]

OUT_DIR loads at any parallel layout; parity.json in it says how it compares with HF_DIR. One parameter at a time is in
memory, but for the comparison of logits with transformers, which holds the whole model.
"""

import argparse
import sys

from megarl.checkpoint.convert import hf_to_megatron


def main() -> int:
    """Exit status 0 when the result is the model, in bits and logits, 1 when not, 2 when nothing was converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", metavar="HF_DIR")
    parser.add_argument("out_dir", metavar="OUT_DIR")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="parallel.*, model.dtype=...")
    parser.add_argument("--no-logits", action="store_true", help="compare tensors only")
    arguments = parser.parse_args()
    try:
        report = hf_to_megatron(
            arguments.hf_dir, arguments.out_dir, arguments.overrides, logits=not arguments.no_logits
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keys, logits = report["keys"], report["logits"]
    print(f"{arguments.out_dir}: {keys['compared']} of {keys['huggingface']} tensors compared")
    print(f"round trip bit for bit: {report['bit_exact']} (largest difference {report['max_abs_diff']:g})")
    print(f"logits against transformers: {logits.get('skipped') or logits['max_abs_diff']}")
    print("\n".join([f"verdict: {report['verdict']}", *report["problems"]]))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
