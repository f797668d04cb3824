"""Directories that appear whole or not at all, and that prove themselves when read.

A directory is written aside, as `.NAME.partial`. Its files are hashed and synced, its manifest is
written last and synced, and one rename makes it appear. A manifest names every file with size and
sha256, and carries a sha256 of itself: a directory counts only if all of it agrees. An older
directory of the same name goes to `.NAME.old` first and is removed last, so that at every moment
one whole directory is there. Light: no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conf.hashing import plain, sha256_of, sha256_of_file

MANIFEST = "manifest.json"
# Keys that the protocol adds to a manifest.
FILES, SIZES, SELF = "files", "file_bytes", "manifest_sha256"


class Damaged(Exception):
    """A directory that is not what was committed; the message says which file, and how."""


def _reached(point: str) -> None:
    """A named moment of the protocol. Does nothing; fault tests end the process here."""


def commit(
    directory: Path,
    *,
    write: Callable[[Path], None],
    meta: Mapping[str, Any],
    manifest: str = MANIFEST,
) -> dict[str, Any]:
    """Write a directory of files, whole or not at all; returns its manifest.

    write: fills the directory that it is given. meta: what the manifest says beside the files. One
    process writes a directory at a time. What an earlier attempt left aside is removed, and what
    this one leaves when `write` fails.

    Raises:
        OSError: no space, no permission; the older directory of this name is still there.
    """
    settle(directory, manifest=manifest)
    building = _aside(directory)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        body = _fill(building, write=write, meta=meta, manifest=manifest)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _swap(building, directory)
    return body


def _fill(
    building: Path, *, write: Callable[[Path], None], meta: Mapping[str, Any], manifest: str
) -> dict[str, Any]:
    _reached("started")
    write(building)
    _reached("written")
    files = sorted(building.iterdir())
    for path in files:
        _sync(path)
    _reached("synced")
    body: dict[str, Any] = plain(dict(meta))
    body[FILES] = {path.name: sha256_of_file(path) for path in files}
    body[SIZES] = {path.name: path.stat().st_size for path in files}
    body[SELF] = sha256_of(body)
    _reached("hashed")
    (building / manifest).write_text(_text(body), encoding="utf-8")
    _reached("manifest written")
    _sync(building / manifest)
    _sync(building)
    _reached("manifest synced")
    return body


def _swap(building: Path, directory: Path) -> None:
    """Make a finished directory appear under its name."""
    older = _older(directory)
    shutil.rmtree(older, ignore_errors=True)
    if directory.exists():
        os.rename(directory, older)  # a rename cannot replace a directory that holds files
        _reached("older moved")
    os.rename(building, directory)
    _reached("renamed")
    _sync(directory.parent)
    _reached("parent synced")
    shutil.rmtree(older, ignore_errors=True)


def settle(directory: Path, *, manifest: str = MANIFEST) -> None:
    """Finish what a process that was killed between two renames left, so that a name is there."""
    if directory.exists():
        return
    for left in (_aside(directory), _older(directory)):
        if left.is_dir() and is_whole(left, manifest=manifest):
            os.rename(left, directory)
            _sync(directory.parent)
            return


def remains(parent: Path) -> list[Path]:
    """Names below a directory for which a killed process left something aside."""
    if not parent.is_dir():
        return []
    names = {
        path.name.removeprefix(".").removesuffix(suffix)
        for path in parent.iterdir()
        for suffix in (".partial", ".old")
        if path.name.startswith(".") and path.name.endswith(suffix)
    }
    return [parent / name for name in sorted(names)]


def read_verified(directory: Path, *, manifest: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a whole directory.

    Raises:
        Damaged: anything differs by as little as a bit from what was committed.
    """
    body = _read_manifest(directory / manifest)
    expected: dict[str, str] = body[FILES]
    found = {path.name for path in directory.iterdir()} - {manifest}
    if found != set(expected):
        odd = ", ".join(sorted(found ^ set(expected)))
        raise Damaged(f"{directory}: missing or extra files: {odd}")
    for name, digest in expected.items():
        size = (directory / name).stat().st_size
        if size != body[SIZES][name]:
            raise Damaged(f"{directory / name}: {size} bytes instead of {body[SIZES][name]}")
        if sha256_of_file(directory / name) != digest:
            raise Damaged(f"{directory / name}: its content is not what was written")
    return body


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that agrees with itself, byte for byte."""
    try:
        text = path.read_text(encoding="utf-8")
        body: dict[str, Any] = json.loads(text)
        rest = {key: value for key, value in body.items() if key != SELF}
        is_right = body[SELF] == sha256_of(rest) and text == _text(body)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{path}: {type(error).__name__}: {error}") from error
    if not is_right:
        raise Damaged(f"{path}: its content is not what was written")
    return body


def is_whole(directory: Path, *, manifest: str = MANIFEST) -> bool:
    """Whether a directory is there and is what was committed."""
    try:
        read_verified(directory, manifest=manifest)
    except (Damaged, OSError):
        return False
    return True


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=2, sort_keys=True) + "\n"


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _older(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _sync(path: Path) -> None:
    """Make a file's or directory's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
