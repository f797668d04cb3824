"""The commit protocol under SIGKILL at each of its steps, and under flipped, cut and lost bytes."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import JobFailed
from training import commit as protocol
from training.commit import Damaged, commit, is_whole, read_verified, remains, settle
from training.saver import no_room
from training.state import (
    StateTensors,
    keep_newest,
    newest_state,
    remove_states,
    states_directory,
    write_state,
)

ROOT = Path(__file__).parents[2]
POINTS = (
    "started",
    "written",
    "synced",
    "hashed",
    "manifest written",
    "manifest synced",
    "older moved",
    "renamed",
    "parent synced",
)
# Commits version 1 and then 2 over it, and is killed at a point of the second; or of the first.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from training import commit as protocol

place, point, version = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def write(number):
    def files(building):
        (building / "a.bin").write_bytes(number * 5000)
        (building / "b.txt").write_text("content " + number.decode())
    return files

def reached(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

if version == "2":
    protocol.commit(place, write=write(b"1"), meta={"version": 1})
protocol._reached = reached
protocol.commit(place, write=write(version.encode()), meta={"version": int(version)})
"""


def killed(place, point, version):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place), point, version],
        cwd=ROOT,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode


def test_the_script_names_every_point():
    """A new moment of the protocol has to be killed at, too."""
    source = Path(protocol.__file__).read_text()
    assert sorted(POINTS) == sorted(part.split('")')[0] for part in source.split('_reached("')[1:])


@pytest.mark.parametrize("point", POINTS)
def test_killed_over_an_older_directory(point, tmp_path):
    place = tmp_path / "thing"
    assert killed(place, point, "2") == -signal.SIGKILL
    settle(place)
    version = read_verified(place)["version"]
    durable = POINTS.index(point) >= POINTS.index("older moved")
    assert version == (2 if durable else 1)
    text = str(version)
    assert (place / "b.txt").read_text() == f"content {text}"
    commit(place, write=lambda b: (b / "c").write_text("3") and None, meta={"version": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]  # nothing is left aside
    assert read_verified(place)["version"] == 3


@pytest.mark.parametrize("point", [p for p in POINTS if p != "older moved"])
def test_killed_in_a_first_commit(point, tmp_path):
    place = tmp_path / "thing"
    assert killed(place, point, "1") == -signal.SIGKILL
    for left in remains(tmp_path):
        settle(left)
    whole = POINTS.index(point) >= POINTS.index("manifest written")
    assert is_whole(place) == whole
    assert place.exists() == whole


def test_a_writer_that_fails_leaves_the_older_directory(tmp_path):
    place = tmp_path / "thing"
    commit(place, write=lambda b: (b / "a").write_text("1") and None, meta={"version": 1})

    def full(building):
        (building / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit(place, write=full, meta={"version": 2})
    assert read_verified(place)["version"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert "12 bytes" in no_room(place, 12, OSError("x"))


def test_fifty_of_fifty_flipped_bytes_are_found(tmp_path):
    place = _some_state(tmp_path, step=1)
    source = random.Random(0)
    files = sorted(place.iterdir())
    assert len(files) == 2
    found = 0
    for number in range(50):
        path = files[number % 2]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        path.write_bytes(bytes(data))
        with pytest.raises(Damaged, match=path.name.replace(".", r"\.")):
            read_verified(place)
        found += 1
        path.write_bytes(whole)
    assert found == 50
    assert is_whole(place)


@pytest.mark.parametrize("keep", (0, 1, 50, -1))
def test_cut_files_are_found(keep, tmp_path):
    place = _some_state(tmp_path, step=1)
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        assert not is_whole(place)
        path.unlink()
        assert not is_whole(place)
        path.write_bytes(whole)
    (place / "extra").touch()
    assert not is_whole(place)


def _tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    for name in ("model.a", "model.b.c"):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            yield f"{kind}/{name}", torch.randn(7, 5, generator=generator)


def _some_state(output_dir, *, step, training="t", seed=0):
    return write_state(
        output_dir,
        training=training,
        step=step,
        adam_steps=step,
        seed=0,
        totals={"tokens": 10 * step},
        is_linear_swapped=True,
        tensors=_tensors(seed),
    )


@pytest.mark.parametrize("part_bytes", (1, 300, 1 << 30))
def test_what_is_written_is_read(part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("training.state.PART_BYTES", part_bytes)
    place = _some_state(tmp_path, step=13, seed=3)
    state = newest_state(tmp_path, training="t").state
    assert (state.directory, state.step, state.adam_steps) == (place, 13, 13)
    assert state.totals == {"tokens": 130} and state.is_linear_swapped
    tensors = StateTensors(state)
    assert tensors.names() == {"model.a", "model.b.c"}
    for key, tensor in _tensors(3):
        kind, _, name = key.partition("/")
        assert torch.equal(tensors.get(kind, name), tensor)
    assert len(list(place.glob("*.safetensors"))) == {1: 6, 300: 2, 1 << 30: 1}[part_bytes]


def test_no_state_is_a_fresh_start(tmp_path):
    assert newest_state(tmp_path, training="t").state is None
    assert newest_state(tmp_path, training="t").notes == ()


@settings(deadline=None, max_examples=12)
@given(steps=st.sets(st.integers(1, 30), min_size=1, max_size=5), data=st.data())
def test_the_newest_whole_state_is_taken(steps, data, tmp_path_factory):
    """Against the definition: the largest step of ours whose directory was not touched."""
    output_dir = tmp_path_factory.mktemp("out")
    fates = {s: data.draw(st.sampled_from(("whole", "damaged", "foreign"))) for s in sorted(steps)}
    for step, fate in fates.items():
        place = _some_state(output_dir, step=step, training="u" if fate == "foreign" else "t")
        if fate == "damaged":
            path = next(place.glob("*.safetensors"))
            data_bytes = path.read_bytes()
            path.write_bytes(data_bytes[:-1] + bytes([data_bytes[-1] ^ 1]))
    whole = [step for step, fate in fates.items() if fate == "whole"]
    if not whole and "damaged" in fates.values():
        with pytest.raises(JobFailed, match="no state is whole"):
            newest_state(output_dir, training="t")
        return
    found = newest_state(output_dir, training="t")
    assert (found.state and found.state.step) == (max(whole) if whole else None)
    passed_over = [step for step in steps if not whole or step > max(whole)]
    assert len(found.notes) == len(passed_over)


@pytest.mark.parametrize(
    "named", ("", "step-000001", "step-000009", "../elsewhere", "global_step2")
)
def test_a_file_called_latest_decides_nothing(named, tmp_path):
    """Other libraries keep one; ours go by manifests alone, whatever such a file names."""
    for step in (1, 2):
        _some_state(tmp_path, step=step)
    for place in (tmp_path, states_directory(tmp_path)):
        (place / "latest").write_text(named)
    found = newest_state(tmp_path, training="t")
    assert found.state is not None and found.state.step == 2
    assert found.notes == ()


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        _some_state(tmp_path, step=step)
        keep_newest(tmp_path, count=2)
    names = sorted(p.name for p in states_directory(tmp_path).iterdir())
    assert names == ["step-000004", "step-000005"]
    remove_states(tmp_path)
    assert not states_directory(tmp_path).exists()


def test_a_manifest_says_what_is_there(tmp_path):
    place = _some_state(tmp_path, step=2)
    body = json.loads((place / "manifest.json").read_text())
    (name,) = body["files"]
    assert body["file_bytes"] == {name: (place / name).stat().st_size}
    assert body["step"] == 2 and body["seed"] == 0
