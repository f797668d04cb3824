"""What belongs to submitted runs, which are not built yet; each command refuses by name."""

from __future__ import annotations

from typing import NoReturn

from conf.errors import NotBuiltYet


def refuse(command: str) -> NoReturn:
    """Refuse a command that needs a run on another machine.

    Raises:
        NotBuiltYet: always.
    """
    raise NotBuiltYet(
        f"python -m launch.{command}",
        instead="runs are local so far: press Ctrl-C to stop one, type its command again to go on, "
        "python -m launch.status outputs/RUN to see it",
    )
