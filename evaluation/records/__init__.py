"""What a run directory holds, read as typed records and as data frames."""
