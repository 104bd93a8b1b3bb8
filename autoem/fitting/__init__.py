"""Stage 5, run: a `Kernel`, a start and data in; the state at the end of one compiled loop out."""
