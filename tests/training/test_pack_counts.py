"""What a pack computes, scores, saves and bills; small passes; memory that runs out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import training.pack_model as pack_model
from conf.errors import JobFailed
from tests.training.pack_cases import (
    LABELS,
    SETTINGS,
    Told,
    plain_training,
    row_loss,
    saved_weights,
    with_memory_for,
    worst_gap,
)
from training.job import CHECKPOINT_FILE, TrainingStopped
from training.pack_passes import PackPasses
from training.train_pack import train_pack

INSTRUCTION_TOKENS = 3  # shared by all rows of conftest.make_rows

pytestmark = pytest.mark.usefixtures("exact_norms")


def test_rows_computed_are_the_trials_own(make_trial, run_pack, label_rows_path):
    """A hook on the embedding counts what the records, rungs and probes say, to the token."""
    counted = []

    def see(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            counted.append(inputs[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        outcomes, told = run_pack(
            [make_trial(trial) for trial in range(4)],
            rungs=(0.3, 1.0),
            judge=lambda pack, rung: [3] if rung == 0 and 3 in pack.live else [],
        )
    finally:
        hook.remove()
    trained = sum(r.tokens for r in told.records)
    others = sum(o.scored_tokens + o.summary.probe_tokens for o in outcomes.values())
    assert sum(counted) == trained + others
    rows = [json.loads(line) for line in label_rows_path.read_text().splitlines()]
    # All items begin with the instruction; nothing is asked after a row's last token.
    contexts = {
        (row["item_id"] if end > INSTRUCTION_TOKENS else "", tuple(row["input_ids"][:end]))
        for row in rows
        for end in range(1, len(row["input_ids"]))
    }
    once = len(contexts)
    assert once < sum(len(row["input_ids"]) for row in rows) / 5
    assert outcomes[0].scored_tokens == 2 * once
    assert outcomes[3].scored_tokens == once


def test_a_step_is_one_pass_and_small_passes_change_nothing(make_trial, run_pack, monkeypatch):
    jobs = [make_trial(trial) for trial in range(3)]
    sizes = []
    backward = pack_model.PackModel.backward

    def seen(model, parts):
        sizes.append(len(parts))
        return backward(model, parts)

    monkeypatch.setattr(pack_model.PackModel, "backward", seen)
    whole, told = run_pack(jobs)
    assert sizes == [3] * 6
    sizes.clear()
    init = PackPasses.__init__

    def small(self, *given, **named):
        init(self, *given, **named)
        self.max_tokens = 1

    monkeypatch.setattr(PackPasses, "__init__", small)
    again, other = run_pack(jobs)
    assert sizes == [1] * 18
    for trial in range(3):
        assert other.losses(trial) == pytest.approx(told.losses(trial), abs=1e-12)
        assert worst_gap(saved_weights(whole[trial]), saved_weights(again[trial])) <= 1e-10


def test_out_of_memory_takes_the_step_again_in_smaller_passes(make_trial, run_pack, monkeypatch):
    jobs = [make_trial(trial) for trial in range(3)]
    whole, told = run_pack(jobs)
    monkeypatch.setattr(pack_model.PackModel, "backward", with_memory_for(1))
    again, other = run_pack(jobs)
    assert any("out of memory" in note.note for note in other.notes)
    for trial in range(3):
        assert other.losses(trial) == pytest.approx(told.losses(trial), abs=1e-12)
        assert worst_gap(saved_weights(whole[trial]), saved_weights(again[trial])) <= 1e-10
        assert again[trial].summary.redone_tokens > 0

    def fuller(model, parts):
        raise MemoryError

    monkeypatch.setattr(pack_model.PackModel, "backward", fuller)
    with pytest.raises(JobFailed, match="out of memory with"):
        run_pack(jobs)


def test_scores_are_those_of_plain_peft(make_trial, run_pack, label_rows_path):
    job = make_trial(0, dtype="float64", steps=30)
    kept = {}

    def judge(pack, rung):
        kept.update({(rung, k): s for k, s in pack.scores[rung].items()})
        return []

    outcomes, _ = run_pack([job, make_trial(1, steps=30)], rungs=(0.5, 1.0), judge=judge)
    _, _, model = plain_training(job)
    rows = [json.loads(line) for line in label_rows_path.read_text().splitlines()]
    with torch.no_grad():
        sums = torch.tensor([-float(row_loss(model, row)[0]) for row in rows]).view(-1, LABELS)
    right = torch.tensor([row["is_reference"] for row in rows]).view(-1, LABELS)
    calibrated = sums - sums.softmax(1).mean(0).log()  # Zhou et al. 2023
    raw, wanted = (right.gather(1, way.argmax(1, keepdim=True)) for way in (sums, calibrated))
    if raw.sum() >= wanted.sum():
        wanted = raw
    wanted = tuple(wanted.flatten().double().tolist())
    likelihood = float(calibrated.log_softmax(1)[right].mean())
    score = kept[1, 0]
    assert score.per_item == wanted and score.value == sum(wanted) / 9
    assert score.tie_break == pytest.approx(likelihood, abs=1e-5)
    assert sum(wanted) > 0, "a training that learned nothing tests nothing"
    assert (score.step, score.metric, score.trial, score.rung) == (30, "accuracy", 0, 1)
    assert kept[0, 0].step == 15
    assert outcomes[0].scores == (kept[0, 0], kept[1, 0])


def test_items_of_one_row_are_scored_by_their_loss(make_trial, rows_path):
    kept = {}

    def judge(pack, rung):
        kept.update(pack.scores[rung])
        return []

    job = make_trial(0)
    train_pack([job], Told(), rung_rows_path=rows_path, rungs=(1.0,), judge=judge)
    _, _, model = plain_training(job)
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    with torch.no_grad():
        pairs = [row_loss(model, row) for row in rows]
    assert kept[0].metric == "minus_loss"
    assert kept[0].per_item == pytest.approx([-float(loss) / n for loss, n in pairs], abs=1e-9)


def test_two_rungs_on_one_step_are_scored_once(make_trial, run_pack):
    seen = []
    outcomes, _ = run_pack(
        [make_trial(0, steps=1)], rungs=(0.1, 0.5), judge=lambda pack, rung: seen.append(rung) or []
    )
    assert seen == [0, 1]
    first, second = outcomes[0].scores
    assert first.per_item == second.per_item and first.tokens > 0 and second.tokens == 0
    assert outcomes[0].scored_tokens == first.tokens


def test_checkpoints_are_peft_directories(make_trial, run_pack, base_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from training.commit import is_whole

    jobs = [make_trial(trial) for trial in range(2)]
    outcomes, _ = run_pack(jobs)
    for job in jobs:
        directory = Path(outcomes[job.trial].checkpoint)
        place = Path(job.output_dir) / "trials" / str(job.trial) / "final" / "checkpoint"
        assert directory == place and is_whole(directory, manifest=CHECKPOINT_FILE)
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float64)
        loaded = PeftModel.from_pretrained(base, directory)
        record = json.loads((directory / "checkpoint.json").read_text())
        assert record["step"] == 6 and record["train_seed"] == job.trainer.seed
        assert len(record["probe"]) == 20
        for item in record["probe"][:3]:
            ids = item["prompt_ids"] + item["target_ids"]
            mask = [0] * len(item["prompt_ids"]) + [1] * len(item["target_ids"])
            with torch.no_grad():
                loss, _ = row_loss(loaded, {"input_ids": ids, "target_mask": mask})
            assert item["logprob"] == pytest.approx(-float(loss), abs=1e-9)
        assert outcomes[job.trial].summary.checkpoint_bytes == sum(
            path.stat().st_size for path in directory.iterdir()
        )


def test_activation_checkpointing_changes_nothing(make_trial, run_pack):
    jobs = [make_trial(trial) for trial in range(3)]
    whole, _ = run_pack(jobs)
    leaner = [
        replace(job, trainer=replace(job.trainer, activation_checkpointing=True)) for job in jobs
    ]
    again, _ = run_pack(leaner)
    for trial in range(3):
        assert worst_gap(saved_weights(whole[trial]), saved_weights(again[trial])) <= 1e-10


def test_time_and_money_add_up(make_trial, run_pack):
    outcomes, told = run_pack([make_trial(trial) for trial in range(3)])
    for trial, outcome in outcomes.items():
        records = [r for r in told.records if r.trial == trial]
        assert outcome.summary.device_seconds == pytest.approx(
            sum(r.device_seconds for r in records)
        )
        for record in records:
            assert record.usd == pytest.approx(0.5 * record.device_seconds)
            assert record.train_seed == SETTINGS[trial][4] and record.trial == trial
        assert outcome.summary.tokens == sum(r.tokens for r in records)
    firsts = [r for r in told.records if r.step == 1]
    rates = [r.step_seconds / r.tokens for r in firsts]
    assert rates == pytest.approx([rates[0]] * 3)  # of one step, by tokens


def test_a_stopped_pack_says_so(make_trial, run_pack):
    with pytest.raises(TrainingStopped):
        run_pack([make_trial(0)], told=Told(stop_after=2))
