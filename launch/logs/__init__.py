"""What jobs say while they work and when they fail, without secrets."""
