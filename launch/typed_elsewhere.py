"""`python launch/typed_elsewhere.py BASE64`: launch.py, with arguments that crossed shells."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path


def arguments_of(packed: str) -> list[str]:
    """What was typed, from base64 of a JSON list."""
    found = json.loads(base64.b64decode(packed, validate=True))
    if not (isinstance(found, list) and all(isinstance(a, str) for a in found)):
        raise SystemExit("launch/typed_elsewhere.py takes base64 of a JSON list of texts.")
    return found


if __name__ == "__main__":
    code = Path(__file__).resolve().parent.parent
    os.chdir(code)
    os.execv(sys.executable, [sys.executable, "launch.py", *arguments_of(sys.argv[1])])
