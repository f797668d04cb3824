"""Checkpoint directories made to run code: refused before anything is loaded."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conf.errors import Refused
from launch.compose import compose_config
from launch.preflight import check

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """What unpickling it does: it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.marker, "ran"))


def adapter(path: Path, **config: object) -> Path:
    """An adapter as peft saves one, of a single zero."""
    path.mkdir()
    save_file({"a": np.zeros(1, dtype=np.float32)}, path / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(given))
    return path


def pickled(name: str) -> Callable[[Path, bytes], None]:
    """Pickled weights in place of the others."""

    def do(directory: Path, payload: bytes) -> None:
        (directory / "adapter_model.safetensors").unlink()
        (directory / name).write_bytes(payload)

    return do


def beside(name: str) -> Callable[[Path, bytes], None]:
    """Pickled weights beside the others, for a library that prefers them."""

    def do(directory: Path, payload: bytes) -> None:
        (directory / name).write_bytes(payload)

    return do


def renamed(directory: Path, payload: bytes) -> None:
    """A pickle that calls itself safetensors."""
    (directory / "adapter_model.safetensors").write_bytes(payload)


def lying_header(directory: Path, payload: bytes) -> None:
    """A header that says it is longer than any memory."""
    path = directory / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + payload)


def lying_offsets(directory: Path, payload: bytes) -> None:
    """A tensor that reaches far behind the file's end."""
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    path = directory / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


HOSTILE = {
    "pickle": pickled("adapter_model.bin"),
    "checkpoint": pickled("model.ckpt"),
    "pickle beside": beside("adapter_model.bin"),
    "optimizer beside": beside("optimizer.pt"),
    "renamed pickle": renamed,
    "lying header": lying_header,
    "lying offsets": lying_offsets,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_runs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    marker = tmp_path / "marker"
    directory = adapter(tmp_path / "adapter")
    HOSTILE[kind](directory, pickle.dumps(Payload(marker)))
    config = compose_config(
        ["+exp=zero_shot", f"run.root={tmp_path / 'root'}", f"arms.zero_shot.on={directory}"]
    )
    with pytest.raises(Refused) as caught:
        check(config, exp="zero_shot", command="test")
    assert str(directory) in str(caught.value)
    assert not marker.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """Without this the tests above would pass with a payload that does nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").read_text() == "ran"
