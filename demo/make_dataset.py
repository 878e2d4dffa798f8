"""Make a dataset: the command of arc/generation, whose documentation `--help` prints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arc.generation.families import main

if __name__ == "__main__":
    sys.exit(main())
