"""Stage 2: a `Program` in, a `Program` out, one decision a file."""
