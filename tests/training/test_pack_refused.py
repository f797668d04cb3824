"""What cannot be a trial of a pack, and rows that cannot be scored."""

import json

import pytest

from conf.errors import ConfigError, DataError, ModelError
from conf.groups import TrainerConfig
from conf.methods import FullMethod, LoraMethod
from tests.training.pack_cases import LABELS, Told
from training.pack import Pack


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"trial": None}, "trial"),
        ({"trial": 0}, "trial"),
        ({"method": FullMethod()}, "arms.lora"),
        ({"method": LoraMethod(lora_dropout=0.1)}, "arms.lora"),
        ({"method": LoraMethod(use_dora=True)}, "arms.lora"),
        ({"method": LoraMethod(target_modules=["q_proj", "qproj"])}, "target_modules"),
        ({"method": LoraMethod(target_modules=["lm_head"])}, "target_modules"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"world_size": 2}, "world_size"),
        ({"rows_path": "elsewhere"}, "rows_path"),
        ({"trainer": TrainerConfig(activation_checkpointing=True)}, "activation_checkpointing"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes, where, make_trial, run_pack, label_rows_path):
    with pytest.raises(ConfigError, match=where):
        run_pack([make_trial(0), make_trial(1, **changes)])
    if where in ("target_modules", "trial"):
        pack = Pack([make_trial(0)], Told(), rung_rows_path=label_rows_path, rungs=())
        with pytest.raises(ConfigError, match=where):
            pack.add(make_trial(1, **changes))
        pack.step()  # as if nothing had been
        assert set(pack.live) == {0}


def test_a_model_that_cannot_be_packed_is_refused(make_trial, run_pack):
    with pytest.raises(ModelError, match="can be packed"):
        run_pack([make_trial(0, kernels_impl="reference")])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda rows: rows[:1] + rows[LABELS:], "item row-0: 1 rows"),
        (lambda rows: [r | {"is_reference": False} for r in rows], "reference \\[\\]"),
        (lambda rows: [rows[0] | {"target_mask": [0]}], "row-0"),
        (lambda rows: [], "no rows"),
    ],
)
def test_bad_label_rows_are_refused(change, found, make_trial, label_rows_path, tmp_path):
    rows = [json.loads(line) for line in label_rows_path.read_text().splitlines()]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(DataError, match=found):
        Pack([make_trial(0)], Told(), rung_rows_path=path, rungs=())
