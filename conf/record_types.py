"""Every type of record that a line of a JSONL file can be, by the name that the line bears."""

from __future__ import annotations

from conf import checkpoint_records, records, sweep_records

RECORD_TYPES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        records.Item,
        records.RenderedExample,
        records.SampleRecord,
        records.TrainRecord,
        records.CurvePoint,
        records.LedgerLine,
        records.AnswerRule,
        records.PromptText,
        records.Progress,
        checkpoint_records.CheckpointRecord,
        records.TrainSummary,
        records.TrainingData,
        records.JournalEvent,
        sweep_records.RungRecord,
        sweep_records.RungDecision,
        sweep_records.TrialRecord,
        sweep_records.SweepChoice,
    )
}
