"""What may be asked of a fitted model: its result, posterior, standard errors; and what is odd about how it ended."""
