"""Names and files that would lead out of the directories of a run: all are refused.

What leads out of a model's own directory by a link is in evaluation/models/test_models.py, out of
an archive in test_archive.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from conf.errors import Refused
from evaluation.models.facts import facts
from launch.compose import compose_config
from launch.elsewhere.archive import contents_of
from launch.preflight import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("run.name=..", "run.name"),
        ("run.name=../up", "run.name"),
        ("run.name=/tmp/elsewhere", "run.name"),
        ("run.name=a/b", "run.name"),
        ("run.name=.hidden", "run.name"),
        ("task.name=../../up", "task.name"),  # a run without a name has one made of these two
        ("model.name=../up", "model.name"),
        ("+method@arms.../up=lora", "arms.../up"),
        ("+method@arms.a/b=zero_shot", "arms.a/b"),
    ],
)
def test_a_name_that_leads_out_is_refused(
    override: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Refused) as caught:
        config = compose_config(["+exp=smoke", f"run.root={tmp_path / 'root'}", override])
        check(config, exp="smoke", command="test")
    assert where in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../outside.safetensors", "below/outside.safetensors"])
def test_an_index_cannot_name_a_file_elsewhere(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    outside = tmp_path / "outside.safetensors"
    shutil.move(model / "model.safetensors", outside)
    shutil.copy(outside, model / "other.safetensors")
    (model / "below").mkdir()
    (model / "below/outside.safetensors").symlink_to(outside)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(Refused, match="outside"):
        facts(model)


def test_no_name_in_an_archive_leads_out_of_where_it_is_unpacked(tmp_path: Path) -> None:
    """A file above the directory one is in moves to inputs/."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "rows.csv").write_text("input,label\n" + "a,b\nc,d\n" * 20)
    for path in ("../rows.csv", str(tmp_path / "rows.csv"), "../here/../rows.csv"):
        found = contents_of(compose_config(["+exp=zero_shot", f"task.path={path}"]), here=here)
        for name in found.files:
            assert ".." not in Path(name).parts and not Path(name).is_absolute()
            assert os.path.normpath(name) == name
        assert sum(name.startswith("inputs/") for name in found.files) == 1
