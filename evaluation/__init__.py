"""Tasks, prompts, engines, scores, statistics, bill and report; knows nothing of training."""

from evaluation.records.frames import Run, read_run

__all__ = ["Run", "read_run"]
