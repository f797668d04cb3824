"""What is asked besides the task: sets of our own, other wordings, instructions to obey."""
