"""Copies of jobs and runs in a store: whole or not there, sent once, verified, not in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from conf.clusters import ClusterConfig
from conf.errors import ClusterError
from launch.elsewhere.copies import Copier, fetch_copy
from launch.elsewhere.copy_store import MANIFEST, SHARED_BYTES, Store, check_copy_to
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
KEYS = ["a" * 64, "b" * 64]


class Faulty(MemoryFileSystem):
    """A memory store of its own that fails, lies or hangs after so many writes."""

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    writes_left = 10**9
    fault = "raise"
    is_free = threading.Event()
    opened: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("faulty://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode:
            type(self).writes_left -= 1
            self.opened.append(path)
            if self.writes_left < 0:
                if self.fault == "hang":
                    self.is_free.wait()
                if self.fault != "lie":
                    raise ConnectionError("the store is gone")
        found = super()._open(path, mode, **kwargs)
        if "w" in mode and self.writes_left < 0:
            found.write(b"?")  # before what comes: another content than was given
        return found


fsspec.register_implementation("faulty", Faulty)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    Faulty.store.clear()
    Faulty.pseudo_dirs[:] = [""]
    Faulty.opened.clear()
    Faulty.is_free.clear()
    Faulty.writes_left, Faulty.fault = 10**9, "raise"
    yield
    Faulty.is_free.set()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two finished jobs; its checkpoint is a link to a job's."""
    root = tmp_path / "here"
    for k, key in enumerate(KEYS):
        job = root / ".cache/jobs" / key
        (job / "points/final").mkdir(parents=True)
        (job / "records.jsonl").write_text(f"job {k}\n")
        (job / "done.json").write_text("{}")
        (job / "empty.txt").touch()
        (job / ".half-written").write_text("no")
    weights = root / ".cache/jobs" / KEYS[0] / "points/final/model.safetensors"
    weights.write_bytes(os.urandom(SHARED_BYTES + 7))
    (root / "r/arms/lora/final").mkdir(parents=True)
    os.link(weights, root / "r/arms/lora/final/model.safetensors")
    (root / "r/report.html").write_text("report")
    (root / "r/.lock").write_text("1")
    return root / "r"


def tree(root: Path) -> dict[str, bytes]:
    found = (p for p in root.rglob("*") if p.is_file())
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in found
        if not p.name.startswith(".") or p.suffix == ".partial"
    }


def copied(url: str, run: Path) -> str:
    copier = Copier(url, run)
    copier.job(KEYS[0])
    line = copier.end(KEYS)
    assert line is not None
    return line


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_what_comes_back_is_what_was_copied(run: Path, tmp_path: Path, kind: str) -> None:
    url = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/store"}.get(
        kind, str(tmp_path / "store")
    )
    assert copied(url, run).startswith("Copied to ")
    there = tmp_path / "there" / "r"
    assert fetch_copy(url, there) == f"{there}: 2 jobs, and the run with its report"
    assert tree(there.parent) == tree(run.parent)
    fetch_copy(url, there)  # again: nothing changes
    assert tree(there.parent) == tree(run.parent)


def test_a_checkpoint_is_sent_once_and_a_second_copy_sends_nothing(run: Path) -> None:
    copied("faulty://s", run)
    assert sum(path.endswith("model.safetensors") for path in Faulty.opened) == 1
    for directory in (f"jobs/{KEYS[0]}", f"jobs/{KEYS[1]}", "run"):
        own = [p for p in Faulty.opened if f"/{directory}/" in p]
        assert own[-1].endswith(MANIFEST) and sum(p.endswith(MANIFEST) for p in own) == 1
    Faulty.opened.clear()
    copied("faulty://s", run)
    assert not Faulty.opened
    (run / "report.html").write_text("another report")
    copied("faulty://s", run)
    assert [p.rsplit("/", 1)[1] for p in Faulty.opened] == ["report.html", MANIFEST]


@pytest.mark.parametrize("fault", ["raise", "lie"])
@pytest.mark.parametrize("writes", range(11))
def test_a_store_that_fails_in_the_middle(
    run: Path, tmp_path: Path, writes: int, fault: str
) -> None:
    """What has a manifest is whole; the next time only what is not there is sent."""
    Faulty.writes_left, Faulty.fault = writes, fault
    line = copied("faulty://s", run)
    assert line.startswith("Not all is copied to faulty://s"), line
    if fault == "raise":
        assert "the store is gone" in line
    store = Store("faulty://s", "r")
    for directory in (f"jobs/{KEYS[0]}", f"jobs/{KEYS[1]}", "run"):
        with suppress(ClusterError):  # a manifest that the store made up
            for entry in (store.manifest(directory) or {}).values():
                store.get(entry, tmp_path / "checked" / entry.at)
    good = len(Faulty.opened[:writes])
    Faulty.opened.clear()
    Faulty.writes_left = 10**9
    assert copied("faulty://s", run).startswith("Copied to ")
    assert len(Faulty.opened) == 11 - good  # 8 files, without the shared one, and 3 manifests
    fetch_copy("faulty://s", tmp_path / "there" / "r")
    assert tree(tmp_path / "there") == tree(run.parent)


def test_a_store_that_hangs_is_given_up(run: Path) -> None:
    Faulty.writes_left, Faulty.fault = 3, "hang"
    copier = Copier("faulty://s", run, idle_seconds=0.3)
    line = copier.end(KEYS)
    assert line is not None and "takes nothing since" in line
    Faulty.is_free.set()
    assert copier._thread is not None
    copier._thread.join(timeout=HANG_SECONDS)  # it would write into the next test's store


def test_a_run_that_was_killed_leaves_its_finished_jobs(run: Path, tmp_path: Path) -> None:
    Store("faulty://s", "r").put(run.parent / ".cache/jobs" / KEYS[0], f"jobs/{KEYS[0]}", {})
    line = fetch_copy("faulty://s", tmp_path / "there/r")
    assert "1 finished jobs" in line
    found = tree(tmp_path / "there/.cache/jobs" / KEYS[0])
    assert found == tree(run.parent / ".cache/jobs" / KEYS[0])
    with pytest.raises(ClusterError, match="no copy"):
        fetch_copy("faulty://s", tmp_path / "there/another")


def test_a_changed_file_is_not_fetched(run: Path, tmp_path: Path) -> None:
    """One byte: neither it nor done.json, which would say that the job is whole, comes here."""
    copied("faulty://s", run)
    name = f"/s/r/jobs/{KEYS[0]}/points/final/model.safetensors"
    text = bytearray(Faulty.store[name].getvalue())
    text[-1] ^= 1
    Faulty("faulty").pipe_file(name, bytes(text))
    with pytest.raises(ClusterError, match="as its manifest says"):
        fetch_copy("faulty://s", tmp_path / "there/r")
    found = tree(tmp_path / "there")
    assert not any(p.endswith(("model.safetensors", "done.json", ".partial")) for p in found)


@pytest.mark.parametrize("bad", ["../../up", "/etc/up", "a/../../up", "", "a\\..\\up"])
@pytest.mark.parametrize("where", ["name", "at"])
def test_a_manifest_cannot_lead_out(run: Path, tmp_path: Path, bad: str, where: str) -> None:
    copied("faulty://s", run)
    path = f"/s/r/run/{MANIFEST}"
    content = json.loads(Faulty.store[path].getvalue())
    entry = content["files"].pop("report.html")
    content["files"][bad if where == "name" else "x"] = entry | (
        {"at": bad} if where == "at" else {}
    )
    Faulty("faulty").pipe_file(path, json.dumps(content).encode())
    with pytest.raises(ClusterError, match="a manifest that a run has written"):
        fetch_copy("faulty://s", tmp_path / "there/r")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://key:secret@bucket/runs", "a plain URL"),
        ("https://host/x?sig=1", "a plain URL"),
        ("simplecache::memory://x", "a plain URL"),
        ("nosuch://x", "Protocol not known"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused(url: str, told: str) -> None:
    with pytest.raises(ClusterError, match=told) as caught:
        check_copy_to(ClusterConfig(name="local", copy_to=url))
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named_where_the_driver_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ClusterError, match="s3fs"):
        check_copy_to(ClusterConfig(name="local", copy_to="s3://bucket/runs"))
    elsewhere = ClusterConfig(name="ray", address="http://h:8265", copy_to="s3://bucket/runs")
    check_copy_to(elsewhere)  # its driver will ask


def test_nothing_is_copied_where_nothing_is_asked(run: Path) -> None:
    copier = Copier(None, run)
    copier.job(KEYS[0])
    assert copier.end(KEYS) is None


@pytest.mark.slow
@pytest.mark.all_cores
def test_a_run_goes_on_elsewhere_from_its_copy(tmp_path: Path) -> None:
    """The real command: what was paid for on one machine is not paid for again on another."""
    command = [sys.executable, str(ROOT / "launch.py"), "+exp=smoke", "run.name=r"]

    def launched(root: Path) -> str:
        found = subprocess.run(
            [*command, f"run.root={root}", f"cluster.copy_to={tmp_path}/store"],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            cwd=tmp_path,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    assert f"Copied to {tmp_path}/store/r: " in launched(tmp_path / "here")
    shutil.rmtree(tmp_path / "store/r/run")  # as if the driver's machine had died before the end
    fetch_copy(f"{tmp_path}/store", tmp_path / "there/r")
    assert " 0 jobs to run" in launched(tmp_path / "there")
    results = [json.loads((tmp_path / p / "r/results.json").read_text()) for p in ("here", "there")]
    assert results[0]["arms"].keys() == results[1]["arms"].keys()
    for arm, here in results[0]["arms"].items():
        there = results[1]["arms"][arm]
        assert here["accuracy"] == there["accuracy"] and here["tokens"] == there["tokens"]
        assert here["cost"]["request_usd"] == there["cost"]["request_usd"]
