"""Speed and memory of autoem beside hand-written JAX and other libraries; run it with `python -m tests.benchmarks`.

Nothing here is a test: pytest collects nothing from this folder. The stages, one file each: `workloads` makes the data,
the common start and the common scorer; `contenders_*` fit it; `registry` lists them; `child` measures one contender in
a process of its own; `report` turns measurements into a table; `cold` times small fits,
`crossover` the forms of a chain's messages by size (`chain_messages` holds them); `__main__` is the command.
"""
