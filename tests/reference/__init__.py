"""Real data with published or independently computed answers."""
