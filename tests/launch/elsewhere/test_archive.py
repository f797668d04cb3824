"""What goes to a cluster: our code and the named files, and nothing that lies beside them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from conf.errors import ClusterError
from launch.compose import compose_config
from launch.elsewhere import archive
from launch.elsewhere.archive import CODE, PACKAGES, contents_of, write_archive

ROWS = "input,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))
SECRET = "canary-9f2c4a"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A user's directory with a data file, and beside it what must stay there."""
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={SECRET}")
    (tmp_path / "notes.txt").write_text(SECRET)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "log.txt").write_text(SECRET)
    return tmp_path


def config(*overrides: str):
    return compose_config(["+exp=zero_shot", *overrides])


def test_the_code_is_whole_and_nothing_else_is_there(here: Path):
    found = contents_of(config("task.path=rows.csv"), here=here)
    kept = {name for name in found.files if name not in ("launch.py", "rows.csv")}
    assert all(name.split("/")[0] in PACKAGES and name.endswith(CODE) for name in kept)
    on_disk = {
        path.relative_to(archive.ROOT).as_posix()
        for package in PACKAGES
        for path in (archive.ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert kept == on_disk  # a new kind of file that our code reads has to be listed in CODE
    assert found.files["rows.csv"] == here / "rows.csv"
    assert found.overrides == ()


def test_no_secret_is_in_the_archive(here: Path, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("out") / "a.zip"
    write_archive(contents_of(config("task.path=rows.csv"), here=here), path)
    with zipfile.ZipFile(path) as found:
        assert not any(SECRET.encode() in found.read(name) for name in found.namelist())
        assert found.read("rows.csv").decode() == ROWS


def test_equal_contents_make_equal_bytes(here: Path, tmp_path: Path):
    contents = contents_of(config("task.path=rows.csv"), here=here)
    write_archive(contents, tmp_path / "a.zip")
    (here / "rows.csv").touch()
    write_archive(contents, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_file_elsewhere_moves_and_is_named_anew(here: Path, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "mine.csv"
    away.write_text(ROWS)
    found = contents_of(config(f"task.path={away}"), here=here)
    (name,) = [n for n in found.files if n.startswith("inputs/")]
    assert found.overrides == (f"task.path={name}",)
    assert found.files[name] == away


def test_a_directory_goes_whole(here: Path):
    (here / "data").mkdir()
    for split in ("train", "test"):
        (here / "data" / f"{split}.csv").write_text(ROWS)
    found = contents_of(config("task.path=data"), here=here)
    assert {n for n in found.files if n.startswith("data/")} == {"data/train.csv", "data/test.csv"}


@pytest.mark.parametrize("name", [".env", "prod.env", "server.pem", "id_rsa", "credentials"])
def test_what_looks_like_a_secret_is_refused(here: Path, name: str):
    (here / "data").mkdir()
    (here / "data" / "train.csv").write_text(ROWS)
    (here / "data" / name).write_text(SECRET)
    with pytest.raises(ClusterError, match="looks like a secret"):
        contents_of(config("task.path=data"), here=here)


def test_a_link_out_of_a_directory_is_refused(here: Path, tmp_path_factory):
    target = tmp_path_factory.mktemp("away") / "passwd"
    target.write_text(SECRET)
    (here / "data").mkdir()
    (here / "data" / "train.csv").symlink_to(target)
    with pytest.raises(ClusterError, match="a link to"):
        contents_of(config("task.path=data"), here=here)


def test_a_plugin_elsewhere_is_refused(here: Path, tmp_path_factory):
    plugin = tmp_path_factory.mktemp("away") / "mine.py"
    plugin.write_text("")
    with pytest.raises(ClusterError, match="plugins"):
        contents_of(config(f"plugins=[{plugin}]"), here=here)


def test_too_much_is_refused_before_anything_is_sent(here: Path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 2**20)
    (here / "rows.csv").write_text(ROWS + "x" * 2**20)
    with pytest.raises(ClusterError, match=r"rows\.csv"):
        contents_of(config("task.path=rows.csv"), here=here)
