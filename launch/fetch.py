"""`python -m launch.fetch outputs/RUN`: copy the directory of a submitted run here."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli import guarded


def main(run: Path) -> int:
    """See the module."""
    from launch.submission import fetch, submitted

    return fetch(submitted(run), run)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(sys.argv[1] if len(sys.argv) == 2 else "RUN"))))
