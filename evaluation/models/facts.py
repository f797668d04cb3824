"""What config.json and the safetensors headers say about a model: no torch, milliseconds."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format itself
SAMPLE_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelFacts:
    """A model directory's facts.

    num_parameters: tensors stored, a tied head counted once. hidden: width. max_length: tokens;
    None where the configuration does not say. linear_module_names: distinct last parts of the
    names of linear layers, the head left out: what a LoRA may target. sha256: the fingerprint.
    """

    architecture: str
    num_parameters: int
    num_layers: int
    hidden: int
    vocabulary: int
    max_length: int | None
    linear_module_names: tuple[str, ...]
    tied_head: bool
    sha256: str


@dataclass(kw_only=True, slots=True, frozen=True)
class _Header:
    """One weights file: tensor name -> shape, and the header's own bytes."""

    shapes: dict[str, tuple[int, ...]]
    raw: bytes


def facts(model_dir: Path) -> ModelFacts:
    """Read a model directory's facts, or refuse it.

    Raises:
        ModelError: for remote code (auto_map), pickles without safetensors, links that leave the
            directory, and missing or broken files.
    """
    _check_files(model_dir)
    config = _json(model_dir / "config.json")
    _check_config(model_dir, config)
    headers = {file: _header(file) for file in _weight_files(model_dir)}
    shapes = {name: shape for header in headers.values() for name, shape in header.shapes.items()}
    text = config.get("text_config", config)
    return ModelFacts(
        architecture=str(config["architectures"][0]),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_layers=_number(text, model_dir, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=_number(text, model_dir, "hidden_size", "n_embd", "d_model"),
        vocabulary=_number(text, model_dir, "vocab_size"),
        max_length=text.get("max_position_embeddings") or text.get("n_positions"),
        linear_module_names=_linear_names(shapes),
        tied_head=not any(_is_head(name) for name in shapes),
        sha256=_fingerprint(model_dir, headers),
    )


def _refuse(where: Path, found: str, expected: str, remedy: str = "") -> ModelError:
    return ModelError(str(where), found=found, expected=expected, remedy=remedy)


def _check_files(model_dir: Path) -> None:
    """Refuse what is no safetensors model directory, by its file names alone."""
    if not model_dir.is_dir():
        raise _refuse(
            model_dir, "no such directory", "a directory with config.json and *.safetensors"
        )
    root = model_dir.resolve()
    for file in model_dir.iterdir():
        if file.is_symlink() and not _is_inside(file.resolve(), root):
            raise _refuse(
                file,
                f"a link to {file.resolve()}, outside the directory",
                "files, or links within the model's own directory",
                "copy the file itself into the directory",
            )
    names = {file.name for file in model_dir.iterdir()}
    if "config.json" not in names:
        raise _refuse(model_dir / "config.json", "no such file", "the model's configuration")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        raise _refuse(
            model_dir,
            f"pickled weights ({', '.join(pickles)})" if pickles else "no weights",
            "weights as *.safetensors; pickles run code when they are loaded, so they never are",
            "save the model again with save_pretrained(..., safe_serialization=True)",
        )
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise _refuse(model_dir / "tokenizer.json", "no such file", "the model's tokenizer")


def _is_inside(target: Path, root: Path) -> bool:
    """Whether a link stays in the directory, or in the same model's blobs in the hub's cache."""
    if target.is_relative_to(root):
        return True
    is_snapshot = root.parent.name == "snapshots"
    return is_snapshot and target.is_relative_to(root.parent.parent / "blobs")


def _check_config(model_dir: Path, config: dict[str, Any]) -> None:
    """Refuse remote code and anything that is no causal language model."""
    files = (model_dir / "config.json", model_dir / "tokenizer_config.json")
    for file, content in ((file, _json(file)) for file in files if file.is_file()):
        if content.get("auto_map"):
            raise _refuse(
                file,
                f"auto_map {json.dumps(content['auto_map'])}, which asks to run the model's code",
                "a model of an architecture that transformers ships",
                "choose another model; code out of a model directory never runs here",
            )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise _refuse(model_dir / "config.json", "no `architectures`", "e.g. ['LlamaForCausalLM']")
    if not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise _refuse(
            model_dir / "config.json",
            f"architectures {architectures}",
            "a causal language model, e.g. ['LlamaForCausalLM']",
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refuse(file, f"{type(error).__name__}: {error}", "a JSON object") from error
    if not isinstance(content, dict):
        raise _refuse(file, f"a JSON {type(content).__name__}", "a JSON object")
    return content


def _number(config: dict[str, Any], model_dir: Path, *names: str) -> int:
    """The first of several names that the configuration has: families differ in them."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise _refuse(model_dir / "config.json", f"no {names[0]}", f"{names[0]}: a count")


def _weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights: those the index names, else all."""
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(model_dir.glob("*.safetensors"))
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise _refuse(index, "no weight_map", "an object of tensor name -> file name")
    files = sorted({model_dir / str(name) for name in shards.values()})
    for file in files:
        if not _is_inside(file.resolve(), model_dir.resolve()):
            raise _refuse(index, f"{file.name}, outside the directory", "files beside the index")
        if not file.is_file():
            raise _refuse(
                file, "no such file, though the index names it", "all shards of the model"
            )
    return files


def _header(file: Path) -> _Header:
    """Read a safetensors header, and check that the file is as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise _refuse(file, f"{size} bytes without a safetensors header", "a safetensors file")
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _refuse(file, f"a broken header ({error})", "a safetensors file") from error
    if 8 + length + end != size:
        raise _refuse(
            file,
            f"{size} bytes where the header says {8 + length + end}",
            "a whole file",
            "copy or download it again",
        )
    return _Header(shapes=shapes, raw=raw)


def _is_head(name: str) -> bool:
    return name.removesuffix(".weight").rsplit(".", 1)[-1] in ("lm_head", "embed_out", "output")


def _linear_names(shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Last name parts of matrices inside numbered layers, which embeddings are not."""
    found = set()
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2 and re.search(r"\.\d+\.", name):
            found.add(name.removesuffix(".weight").rsplit(".", 1)[-1])
    return tuple(sorted(found))


def _fingerprint(model_dir: Path, headers: dict[Path, _Header]) -> str:
    """sha256 over configuration, tokenizer, headers, first and last MiB of each weights file.

    All 14 GB of a 7B model would take 9 s of hashing (1.5 GB/s measured) before each run. The
    headers change with any shape, dtype or layout, and training or converting again changes the
    sampled weights; a change made by hand to single weights in between is not seen.
    """
    digest = hashlib.sha256()
    for name in ("config.json", *TOKENIZER_FILES):
        file = model_dir / name
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for file, header in sorted(headers.items()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + header.raw)
        with file.open("rb") as stream:
            stream.seek(8 + len(header.raw))
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, file.stat().st_size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
