"""What a submitted run takes to the cluster: our code and the user's small files, as one archive.

The list of what goes in is made from what is known to belong there. Nothing is shipped because it
lies beside it, so that no `.env`, key, log or output can be. Equal contents make equal bytes, and
Ray uploads an archive that it already has no second time.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from conf.errors import ClusterError
from conf.hashing import plain, sha256_of_file
from conf.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("conf", "launch", "training", "evaluation", "kernels")
CODE = (".py", ".yaml", ".json", ".csv", ".jinja", ".css", ".js")
# Ray takes 512 MiB; what is larger than this belongs on storage that the nodes see.
MAX_BYTES = 100 * 2**20
INPUTS = "inputs"  # where files lie that the user named by an absolute path
# Names that hold secrets by custom. A data file is never called so.
SECRET_NAMES = ("id_rsa", "id_ed25519", "credentials", ".netrc", ".pypirc", "auth_token")
SECRET_SUFFIXES = (".env", ".pem", ".key", ".p12", ".pfx")
FIXED_TIME = (2020, 1, 1, 0, 0, 0)


@dataclass(kw_only=True, slots=True, frozen=True)
class Contents:
    """The files of an archive by their name in it, and the overrides that name moved ones."""

    files: Mapping[str, Path]
    overrides: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of all files, before compression."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(slots=True)
class _Inputs:
    files: dict[str, Path] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def contents_of(config: RunConfig, *, here: Path) -> Contents:
    """The code and the local files that a configuration names.

    A relative path keeps its place, so that the same override finds it on the cluster. A file
    named otherwise moves to inputs/<hash>/, and gets an override of its own.

    Args:
        config: the run.
        here: what relative paths are relative to.

    Raises:
        ClusterError: a file that looks like a secret, a link out of a directory that is shipped, or
            more bytes than an archive takes.
    """
    found = _Inputs(files=_code())
    for key, value in _paths(plain(config)):
        _add(found, key, value, here=here)
    contents = Contents(files=found.files, overrides=tuple(found.overrides))
    if contents.num_bytes > MAX_BYTES:
        name = max(found.files, key=lambda n: found.files[n].stat().st_size)
        raise ClusterError(
            "what the run takes to the cluster",
            found=f"{contents.num_bytes / 2**20:.0f} MB, the largest file {name}",
            expected=f"at most {MAX_BYTES / 2**20:.0f} MB",
            remedy="copy it below cluster.storage, submit from a machine that sees it there, and"
            " write that path",
        )
    return contents


def named_files(config: RunConfig, *, here: Path) -> list[tuple[str, Path]]:
    """Keys and local files that a configuration names."""
    return [
        (key, here / value)
        for key, value in _paths(plain(config))
        if key.rsplit(".", 1)[-1] in FILE_KEYS and (here / value).exists()
    ]


def _code() -> dict[str, Path]:
    found = {"launch.py": ROOT / "launch.py"}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and path.suffix in CODE and not path.is_symlink():
                found[path.relative_to(ROOT).as_posix()] = path
    return found


def _paths(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values of all texts below the sections that name files."""
    if isinstance(values, Mapping):
        return [
            pair
            for key, value in values.items()
            if prefix or key in ("task", "model", "arms", "plugins", "probes")
            for pair in _paths(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(values, list | tuple):
        return [pair for value in values for pair in _paths(value, f"{prefix}[]")]
    return [(prefix, values)] if isinstance(values, str) and values else []


FILE_KEYS = ("path", "train", "validation", "test", "json_schema", "prompt", "on", "plugins[]")


def _add(found: _Inputs, key: str, value: str, *, here: Path) -> None:
    if key.rsplit(".", 1)[-1] not in FILE_KEYS or not (here / value).exists():
        return
    path = here / value
    is_inside = not Path(value).is_absolute() and path.resolve().is_relative_to(here.resolve())
    if is_inside:
        name = PurePosixPath(Path(value)).as_posix()
    elif key.endswith("[]"):
        raise ClusterError(
            key.removesuffix("[]"),
            found=f"{value}, outside the directory you are in",
            expected="files below it, which keep their names on the cluster",
            remedy="copy it here and write its relative path",
        )
    else:
        digest = sha256_of_file(path)[:16] if path.is_file() else path.resolve().name
        name = f"{INPUTS}/{digest}/{path.name}"
        found.overrides.append(f"{key}={name}")
    for own in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if own.is_dir():
            continue
        _refuse_unsafe(key, own, inside=path if path.is_dir() else own.parent)
        below = "" if own == path else f"/{own.relative_to(path).as_posix()}"
        found.files.setdefault(name + below, own)


def _refuse_unsafe(key: str, path: Path, *, inside: Path) -> None:
    name = path.name.lower()
    if name in SECRET_NAMES or name.endswith(SECRET_SUFFIXES):
        raise ClusterError(
            key,
            found=f"{path}, which looks like a secret",
            expected="data, a model or a plugin",
            remedy="take it out of the directory, or rename it if it is none",
        )
    if not path.resolve().is_relative_to(inside.resolve()):
        raise ClusterError(
            key,
            found=f"{path}, a link to {path.resolve()}",
            expected="files of the directory itself",
            remedy="copy the file to where the link is",
        )


def write_archive(contents: Contents, path: Path) -> None:
    """Write the archive; equal contents make equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents.files):
            entry = zipfile.ZipInfo(name, date_time=FIXED_TIME)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents.files[name].read_bytes())
