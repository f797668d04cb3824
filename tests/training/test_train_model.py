"""Rows to tensors, the loss on target rows, LoRA targets, and estimates against real models."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from conf.choices import ZeroStage
from conf.errors import ConfigError, DataError, ModelError
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import RenderedExample
from training.adapters import check_targets
from training.data import num_targets, padded_batch, read_rows
from training.estimate import model_size, resolve_stage, trained_parameters
from training.job import DEFAULT_LEARNING_RATES, TrainJob
from training.model import TargetLoss, build

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "softcapped": Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}


def example(ids, mask, name="a"):
    return RenderedExample(item_id=name, input_ids=tuple(ids), target_mask=tuple(mask))


ROWS = [
    example([5, 6, 7, 8], [0, 0, 1, 1]),
    example([9, 10], [0, 1], "b"),
    example([3, 4, 0, 0, 11, 0], [1, 0, 1, 0, 0, 1], "c"),  # id 0 is a token here, not padding
]


def make_job(model_dir, *, method=None, zero=None, **values):
    fixed = {
        "arm_name": "tuned",
        "method": method or FullMethod(),
        "trainer": TrainerConfig(),
        "zero": zero or ZeroConfig(),
        "model_dir": str(model_dir),
        "base_model": "tiny",
        "base_model_sha256": "",
        "renderer_sha256": "",
        "prompt_sha256": "",
        "rows_path": "",
        "output_dir": "",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "world_size": 1,
        "pad_id": 0,
        "usd_per_device_second": None,
    }
    return TrainJob(**(fixed | values))


def test_padded_batch_by_hand():
    batch = padded_batch(ROWS, pad_id=0)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 0, 0],
        [9, 10, 0, 0, 0, 0],
        [3, 4, 0, 0, 11, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert batch.positions.tolist() == [1, 2, 6, 13, 16]
    assert batch.targets.tolist() == [7, 8, 10, 0, 0]
    assert [num_targets(row) for row in ROWS] == [2, 1, 2]  # a first token is never a target


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_gradients_equal_those_of_all_logits(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).train()
    plain = 0.0
    for row in ROWS:  # one unpadded row at a time, all logits
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].float()
        for t in range(1, len(row.input_ids)):
            if row.target_mask[t]:
                plain = plain - logits[t - 1].log_softmax(-1)[row.input_ids[t]]
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = TargetLoss(model, head=model.get_output_embeddings())(padded_batch(ROWS, pad_id=0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_head_sees_target_rows_only():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    seen = []
    loss = TargetLoss(model, head=model.lm_head)
    model.lm_head.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape)))
    loss(padded_batch(ROWS, pad_id=0))
    assert seen == [(1, 5, 50)]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"item_id": "x", "input_ids": [1, 2], "target_mask": [1, 0]}, "no target"),
        ({"item_id": "x", "input_ids": [1, 2], "target_mask": [0, 0]}, "no target"),
        ({"item_id": "x", "input_ids": [1, 2], "target_mask": [1]}, "2 ids"),
        ({"item_id": "x", "input_ids": [1, 2], "target_mask": [0, 2]}, "2 ids"),
        ({"item_id": "x", "input_ids": [], "target_mask": []}, "no target"),
    ],
)
def test_bad_rows_are_refused_with_their_line(row, found, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"item_id": "g", "input_ids": [1, 2], "target_mask": [0, 1]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=found) as caught:
        read_rows(path)
    assert caught.value.where == f"{path}:2"


def test_no_rows_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / "rows.jsonl")


LINEAR = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("name", ["q_proj", "mlp.up_proj", "model.layers.0.self_attn.q_proj"])
def test_targets_match_as_in_peft(name):
    check_targets([name], layers=LINEAR, key="arms.lora.target_modules")


@pytest.mark.parametrize("name", ["proj", "k_proj", "q_proj.weight", "self_attn", ""])
def test_targets_that_match_nothing_are_refused(name):
    with pytest.raises(ConfigError, match="up_proj"):
        check_targets(["q_proj", name], layers=LINEAR, key="arms.lora.target_modules")


def test_an_adapter_directory_is_no_base(base_dir, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        build(make_job(tmp_path))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", [[], ["q_proj"], ["mlp.up_proj", "v_proj"]])
def test_estimated_parameters_equal_the_built_ones(targets, use_dora, base_dir):
    size = model_size(base_dir)
    method = LoraMethod(lora_rank=5, target_modules=targets, use_dora=use_dora)
    trainee = build(make_job(base_dir, method=method))
    assert trained_parameters(method, size=size) == trainee.trained_parameters
    assert size.num_parameters == trainee.total_parameters - trainee.trained_parameters
    full = build(make_job(base_dir))
    assert trained_parameters(FullMethod(), size=size) == full.trained_parameters
    linear = {n for n, m in full.model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(size.linear_shapes) == linear


@pytest.mark.parametrize(("memory_bytes_free", "stage"), [(10**9, 0), (1_000_000, 3), (None, 0)])
def test_auto_stage_from_the_models_files(memory_bytes_free, stage, base_dir):
    job = make_job(base_dir, world_size=2, device_memory_bytes=memory_bytes_free)
    assert resolve_stage(job, longest_row=20) == stage
    fixed = make_job(base_dir, world_size=2, zero=ZeroConfig(stage=ZeroStage.zero2))
    assert resolve_stage(fixed, longest_row=20) == 2


def test_job_defaults(base_dir):
    assert make_job(base_dir).learning_rate == DEFAULT_LEARNING_RATES["full"]
    lora = make_job(base_dir, method=LoraMethod())
    assert lora.learning_rate == pytest.approx(10 * DEFAULT_LEARNING_RATES["full"])
    own = make_job(base_dir, trainer=TrainerConfig(learning_rate=0.5))
    assert own.learning_rate == 0.5
    assert make_job(base_dir, world_size=3, threads=2).devices == 6
    assert make_job(base_dir, world_size=3, threads=2, device="cuda").devices == 3


@pytest.mark.parametrize(
    ("values", "padded_rows", "tokens"),
    [
        ({}, 4, 800),  # a packed pass of a whole batch
        ({"trainer": TrainerConfig(batch_size=64)}, 4, 2560),  # cut at the budget
        ({"world_size": 3}, 3, 300),  # a worker has 3 rows at most
        ({"trainer": TrainerConfig(micro_batch_size=2)}, 2, 200),
        ({"trainer": TrainerConfig(micro_batch_size=7)}, 7, 700),  # padded, if the model asks so
        ({"trainer": TrainerConfig(batch_size=1)}, 1, 100),
        ({"device": "cuda"}, 8, 800),
    ],
)
def test_size_of_a_pass(values, padded_rows, tokens, base_dir):
    job = make_job(base_dir, **values)
    assert job.padded_rows == padded_rows
    assert job.tokens_per_pass(100) == tokens


def test_a_long_row_is_a_pass(base_dir):
    assert make_job(base_dir).tokens_per_pass(3000) == 12000  # padded: 4 rows
