"""Tasks, prompts, engines, scores, statistics, the bill and the report; knows nothing of training."""
