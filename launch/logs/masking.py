"""Secrets out of what is written down: values of the environment, and what looks like a key.

A net for what libraries print. Nothing of ours prints a secret, and the command line takes none
(launch/overrides.py); a secret that is in no variable and looks like any other word passes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MASK = "***"
# Shorter values are words: masking them would eat the log.
MIN_CHARACTERS = 8
SECRET_NAME = re.compile(
    r"(api[_-]?key|access[_-]?key|private[_-]?key|token|secret|passw|credential|_key$)", re.I
)
# Variables that say where a secret lies, or how tokenizers work.
NO_SECRET_NAME = re.compile(r"(_path|_file|_dir|_sock|_mode)$|^tokenizers_", re.I)
_ASSIGNED = re.compile(
    r"((?:api[_-]?key|access[_-]?key|private[_-]?key|token|secret|password|passwd)"
    r"[\"']?\s*[=:]\s*[\"']?)(?!\*\*\*)[^\s\"',;&<>]{8,}",
    re.I,
)
_SHAPES = re.compile(
    r"(?<=bearer )[^\s\"',;]{8,}"
    r"|\b(?:sk|hf|ghp|gho|ghs|glpat|xox[abp]|github_pat|wandb_v1)[-_][A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]+"
    r"|(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)",
    re.I,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key is called as secrets are."""
    return bool(SECRET_NAME.search(name)) and not NO_SECRET_NAME.search(name)


def secrets_of(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of variables that are called as secrets are, the longest first."""
    variables = os.environ if environment is None else environment
    found = {v for n, v in variables.items() if is_secret_name(n) and len(v) >= MIN_CHARACTERS}
    return tuple(sorted(found, key=len, reverse=True))


def masked(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text with *** where a secret stands, or what has the shape of one."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _SHAPES.sub(MASK, _ASSIGNED.sub(rf"\g<1>{MASK}", text))
