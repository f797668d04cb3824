"""`python -m launch.attach outputs/RUN`: print what a submitted run prints, until it ends."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli import guarded


def main(run: Path) -> int:
    """See the module."""
    from launch.elsewhere.submission import follow, submitted

    return follow(submitted(run))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(sys.argv[1] if len(sys.argv) == 2 else "RUN"))))
