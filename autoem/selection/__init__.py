"""Which structure: sweeps with criteria, held-out likelihood, the bootstrap test, merge and split moves."""

from autoem.selection._bootstrap import BootstrapTest, bootstrap_test
from autoem.selection._select import select
from autoem.selection._selection import Selection
from autoem.selection._split_merge import split_merge

__all__ = ["BootstrapTest", "Selection", "bootstrap_test", "select", "split_merge"]
