"""Searches of an arm's settings: trials, rungs, who goes on, what it is expected to take."""
