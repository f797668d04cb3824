"""From records to results.json: arms, intervals, dimensions, label curves (pure)."""
