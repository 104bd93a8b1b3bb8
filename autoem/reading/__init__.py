"""Stage 1, trace: a NumPyro model and its arguments in, a `Program` out; the handlers that read it are all here."""
