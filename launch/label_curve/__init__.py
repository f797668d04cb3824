"""Runs on ever more labels, in the one plan."""
