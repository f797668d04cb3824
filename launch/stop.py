"""`python -m launch.stop outputs/RUN`: end a submitted run; a training saves its state first."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli import guarded


def main(run: Path) -> int:
    """See the module."""
    from launch.elsewhere.submission import stop, submitted

    return stop(submitted(run))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(Path(sys.argv[1] if len(sys.argv) == 2 else "RUN"))))
