"""Tasks, prompts, engines, scores, statistics, bill and report; knows nothing of training."""
