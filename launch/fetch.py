"""`python -m launch.fetch outputs/RUN [from=URL]`: bring a run's directory here.

A submitted run's comes from the cluster's storage; with `from=` one comes, with its finished jobs,
from where `cluster.copy_to` put it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conf.errors import EXIT_DONE
from launch.cli import guarded
from launch.finished import split_arguments


def main(arguments: list[str]) -> int:
    """See the module."""
    named, rest = split_arguments(arguments, keys=["from"])
    run = Path(rest[0] if len(rest) == 1 else "RUN")
    if "from" in named:
        from launch.elsewhere.copies import fetch_copy

        print(fetch_copy(named["from"], run))
        return EXIT_DONE
    from launch.elsewhere.submission import fetch, submitted

    return fetch(submitted(run), run)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
