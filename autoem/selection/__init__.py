"""Which structure: sweeps with criteria, held-out likelihood, the bootstrap test, merge and split moves."""
