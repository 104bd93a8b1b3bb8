"""What autoem does not take on trust: the data, their indices, and its own derivation against the model's density."""
