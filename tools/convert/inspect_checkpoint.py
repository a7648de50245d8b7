"""Print what a Megatron checkpoint or a Hugging Face directory holds.

python tools/convert/inspect_checkpoint.py DIRECTORY
"""

import argparse
import sys

from megarl.checkpoint.describe import describe


def main() -> int:
    """Exit status 2 when the directory is neither."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY")
    try:
        lines = describe(parser.parse_args().directory)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
