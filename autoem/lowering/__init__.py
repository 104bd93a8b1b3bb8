"""Stage 4, lower: a plan in, a `Kernel` of a few pure functions out; and the data of a call as arrays that it takes."""
