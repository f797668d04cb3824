"""A run's place in an object store, or on any other path that fsspec opens (cluster.copy_to).

<copy_to>/<run>/jobs/<key>/ is a finished job's directory, <copy_to>/<run>/run/ the run's own, as it
ends. A directory's manifest.json comes last, after every other file was read back and found equal:
without it there is no copy. Only the driver, which holds the run's lock, writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

import fsspec

from conf.clusters import ClusterConfig
from conf.errors import ClusterError
from conf.records import from_dict, to_dict
from launch.elsewhere.ray_cluster import is_driver

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 * 2**20
# A file of a run directory that is at least this long and that a job's copy has is not sent twice:
# the checkpoints, which the run directory only shows.
SHARED_BYTES = 2**20


def check_copy_to(config: ClusterConfig) -> None:
    """Refuse a place that the driver could not open, or that holds a secret. Connects to nothing.

    A store's package need not be on a machine that only submits: the driver asks again.

    Raises:
        ClusterError: with what to install or to write.
    """
    is_submitted = config.name in ("slurm", "kuberay") or (
        config.name == "ray" and not is_driver(config)
    )
    if config.copy_to is not None:
        check_url(config.copy_to, where="cluster.copy_to", is_opened_here=not is_submitted)


def check_url(url: str, *, where: str, is_opened_here: bool = True) -> None:
    """Refuse a URL that fsspec does not know, or not without a package that is missing.

    Raises:
        ClusterError: with what to install or to write.
    """
    split = urlsplit(url)
    if (
        split.username
        or split.password
        or split.query
        or "::" in url
        or not split.path + split.netloc
    ):
        raise ClusterError(
            where,
            found="a URL with a name, a password, a query or a chain in it, or with no path",
            expected="a plain URL, e.g. s3://bucket/runs: it is written into config.json",
            remedy="give credentials to the driver as the store's own tools take them",
        )
    protocol = split.scheme or "file"
    try:
        if is_opened_here or protocol not in fsspec.available_protocols():
            fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ClusterError(
            where,
            found=f"{url}: {error}",
            expected="a path, or a URL that the installed fsspec opens",
            remedy="install what it names where the driver runs, e.g. pip install s3fs for s3://",
        ) from None


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """A file of a manifest. at: where it lies, below the copy of the run."""

    bytes: int
    sha256: str
    at: str


class Store:
    """One run's place in a store: files by their path below it.

    moved: called after each chunk that went either way, so that a standstill can be told.
    """

    def __init__(self, url: str, run: str, *, moved: Callable[[], None] = lambda: None) -> None:
        self.fs, root = fsspec.url_to_fs(url)
        self.root = f"{root.rstrip('/')}/{run}"
        self.moved = moved

    def manifest(self, directory: str) -> dict[str, Entry] | None:
        """What a directory's copy holds, by path; None where there is no whole copy.

        Raises:
            ClusterError: a manifest that is none of ours, or that leads out of a directory.
        """
        path = f"{self.root}/{directory}/{MANIFEST}"
        try:
            text = self.fs.cat_file(path)
        except FileNotFoundError:
            return None
        try:
            found = {n: from_dict(Entry, e) for n, e in json.loads(text)["files"].items()}
            is_inside = all(_is_inside(p) for n, e in found.items() for p in (n, e.at))
        except (AttributeError, KeyError, TypeError, ValueError):
            is_inside = False
        if not is_inside:
            raise ClusterError(
                path, found="another content", expected="a manifest that a run has written"
            )
        return found

    def jobs(self) -> list[str]:
        """Keys of the jobs of which there is anything."""
        place = f"{self.root}/jobs"
        if not self.fs.exists(place):
            return []
        names = [str(p).rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(place, detail=False)]
        return sorted(n for n in names if len(n) >= 8 and n.isalnum())

    def put(self, source: Path, directory: str, known: Mapping[str, str]) -> dict[str, Entry]:
        """Copy a directory, what is there already excepted; the manifest last.

        known: sha256 -> where the store has such a file already.

        Raises:
            Exception: the store's own; OSError where it gives back what it was not given.
        """
        names = [n for n in _files(source) if n != MANIFEST]
        here = {n: self._entry(source / n, f"{directory}/{n}", known) for n in names}
        manifest = f"{self.root}/{directory}/{MANIFEST}"
        self.fs.invalidate_cache()
        if self._is_whole(directory, here):
            return here
        if self.fs.exists(manifest):
            self.fs.rm_file(manifest)  # it would vouch for files that are about to change
        for name, entry in here.items():
            if entry.at == f"{directory}/{name}" and not self._has(entry):
                self._send(source / name, entry)
        content = {"schema_version": 1, "files": {n: to_dict(e) for n, e in here.items()}}
        self.fs.makedirs(manifest.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(manifest, json.dumps(content, indent=1).encode())
        if not self._is_whole(directory, here):
            raise OSError(f"{manifest}: the store does not give back what it was given")
        return here

    def _is_whole(self, directory: str, here: Mapping[str, Entry]) -> bool:
        with suppress(ClusterError):
            return self.manifest(directory) == here
        return False

    def _entry(self, path: Path, at: str, known: Mapping[str, str]) -> Entry:
        with path.open("rb") as stream:
            sha256, size = _digest(stream, self.moved)
        if size >= SHARED_BYTES:
            at = known.get(sha256, at)
        return Entry(bytes=size, sha256=sha256, at=at)

    def _send(self, source: Path, entry: Entry) -> None:
        place = f"{self.root}/{entry.at}"
        self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        with source.open("rb") as read, self.fs.open(place, "wb") as write:
            for chunk in _chunks(read):
                write.write(chunk)
                self.moved()
        self.fs.invalidate_cache()
        if not self._has(entry):
            raise OSError(f"{place}: the store does not give back what it was given")

    def _has(self, entry: Entry) -> bool:
        place = f"{self.root}/{entry.at}"
        try:
            if self.fs.size(place) != entry.bytes:
                return False
            with self.fs.open(place, "rb") as stream:
                return _digest(stream, self.moved) == (entry.sha256, entry.bytes)
        except FileNotFoundError:
            return False

    def get(self, entry: Entry, target: Path) -> None:
        """Bring one file here, unless it is here; under its name only once its hash is right.

        Raises:
            ClusterError: the store has another content than the manifest says.
        """
        if target.is_file() and not target.is_symlink():
            with target.open("rb") as stream:
                if _digest(stream, self.moved) == (entry.sha256, entry.bytes):
                    return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        digest = hashlib.sha256()
        with self.fs.open(f"{self.root}/{entry.at}", "rb") as read, partial.open("wb") as write:
            for chunk in _chunks(read):
                digest.update(chunk)
                write.write(chunk)
        if digest.hexdigest() != entry.sha256:
            partial.unlink()
            raise ClusterError(
                f"{self.root}/{entry.at}",
                found=f"sha256 {digest.hexdigest()[:12]}...",
                expected=f"{entry.sha256[:12]}..., as its manifest says",
                remedy="type the run's own command again: it copies what is not whole",
            )
        partial.replace(target)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path


def _files(directory: Path) -> list[str]:
    """Paths of the files below a directory; links, locks and half-written files are none of it.

    done.json is last: a job is whole once it is there.
    """
    found = [
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]
    return sorted(found, key=lambda name: (name == "done.json", name))


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _digest(stream: IO[bytes], moved: Callable[[], None]) -> tuple[str, int]:
    """sha256 and number of bytes of what is left of a stream."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(stream):
        digest.update(chunk)
        size += len(chunk)
        moved()
    return digest.hexdigest(), size
