"""One evaluation job: from an arm's prompts to billed records of answers."""
