"""Prove that a merged model is the sum of its base and an adapter.

    python -m arc.merging output/Llama-3.2-1B-Base-lora output/Llama-3.2-1B-Base-merged

Prints one line with the figures, or says what differs and ends with exit code 1. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """The command line. Heavy libraries are imported after it is parsed, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m arc.merging", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="a -lora folder")
    parser.add_argument("merged", type=Path, help="its -merged folder")
    parser.add_argument("--base", help="the base folder (default: the one that the adapter names)")
    parser.add_argument(
        "--merge_base", choices=("quantised", "original"), help="default: as the manifest of the merge says"
    )
    # How merge_in_own_process calls this: as JSON; and the file for the result, which also means to merge first.
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from arc.merging.merge import merge_and_check
    from arc.merging.own_process import end_with_parent, write_error
    from arc.merging.proof import check_merge, describe_check
    from arc.models.loading import Precision
    from arc.models.manifests import read_manifest
    from arc.models.weights import MergeError

    try:
        options = {
            "base": args.base,
            "merge_base": args.merge_base or read_manifest(args.merged).get("merge_base") or "quantised",
            "precision": Precision(**json.loads(args.precision)) if args.precision else None,
        }
        if args.merge:
            end_with_parent()
            done = merge_and_check(args.adapter, args.merged, **options, own_process=False)
            args.merge.write_text(json.dumps(done), encoding="utf-8")
        else:
            print(describe_check(check_merge(args.adapter, args.merged, **options)))
    except Exception as error:
        if args.merge:
            write_error(error, args.merge)
            sys.exit(1)
        if not isinstance(error, (MergeError, ValueError, OSError)):
            raise
        sys.exit(str(error))


if __name__ == "__main__":
    main()
