"""`python -m launch.attach RUN`: for submitted runs, not built yet."""

from __future__ import annotations

import sys

from launch.cli import guarded
from launch.submitted import refuse

if __name__ == "__main__":
    sys.exit(guarded(lambda: refuse("attach")))
