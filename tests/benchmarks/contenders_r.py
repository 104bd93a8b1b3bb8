"""The R packages mclust and flexmix, where `Rscript` is there (on Debian: `apt install r-cran-mclust r-cran-flexmix`).

Data go over as raw doubles in a temporary folder. R measures its own seconds, so that its start is not counted; its
peak memory is that of the whole R process less the data.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ._contender import Contender, Outcome
from .workloads import Workload

_MCLUST = """
suppressMessages(library(mclust))
X <- matrix(readBin("data", "double", {n} * {d}), {n}, {d})
v <- readBin("start", "double", {k} * (1 + {d} + {d} * {d}))
S <- array(v[{k} + {k} * {d} + (1:({k} * {d} * {d}))], c({d}, {d}, {k}))
variance <- list(modelName = "VVV", d = {d}, G = {k}, sigma = S,
                 cholsigma = array(apply(S, 3, chol), c({d}, {d}, {k})))
start <- list(pro = v[1:{k}], mean = matrix(v[{k} + (1:({k} * {d}))], {d}, {k}), variance = variance)
control <- emControl(eps = 0, tol = c(0, 0), itmax = c({steps}, {steps}))
t <- proc.time()[3]
r <- em(X, modelName = "VVV", parameters = start, control = control)
cat("SECONDS", proc.time()[3] - t, "\\n")
p <- r$parameters
writeBin(c(p$pro, as.vector(p$mean), as.vector(p$variance$sigma)), "result")
"""

_FLEXMIX = """
suppressMessages(library(flexmix))
Z <- matrix(readBin("data", "double", {n} * ({p} + 1)), {n}, {p} + 1)
r <- matrix(readBin("start", "double", {n} * {k}), {n}, {k})
D <- data.frame(y = Z[, {p} + 1])
D$X <- Z[, 1:{p}]
control <- list(iter.max = {steps}, tolerance = 0, minprior = 0)
t <- proc.time()[3]
m <- flexmix(y ~ X - 1, data = D, k = {k}, cluster = r, control = control)
cat("SECONDS", proc.time()[3] - t, "\\n")
P <- parameters(m)
writeBin(c(prior(m), as.vector(P[1:{p}, ]), P[{p} + 1, ]^2), "result")
"""


def _run_r(script: str, data: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Run `script` beside the files `data` and `start`; gives the doubles it wrote, its seconds and its peak MiB."""
    if shutil.which("Rscript") is None:
        raise ImportError("Rscript is not installed")
    with tempfile.TemporaryDirectory() as folder:
        data.tofile(Path(folder, "data"))
        start.tofile(Path(folder, "start"))
        Path(folder, "script.R").write_text(script)
        done = subprocess.run(["Rscript", "script.R"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ImportError(done.stderr.strip()[-300:])
        seconds = float(next(line for line in done.stdout.splitlines() if line.startswith("SECONDS")).split()[1])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 - data.nbytes / 2**20
        return np.fromfile(Path(folder, "result")), seconds, peak


def mclust(w: Workload) -> Callable[[], Outcome]:
    """mclust's compiled `em` for the model VVV."""
    n, d = w.data["x"].shape
    k = len(w.start["weights"])
    script = _MCLUST.format(n=n, d=d, k=k, steps=w.num_steps)
    start = np.concatenate([w.start[name].ravel() for name in ("weights", "loc", "cov")])

    def run() -> Outcome:
        flat, seconds, peak = _run_r(script, w.data["x"].T, start)
        weights, loc, cov = np.split(flat, [k, k + k * d])
        params = {"weights": weights, "loc": loc.reshape(k, d), "cov": cov.reshape(k, d, d)}
        return Outcome(params, seconds, peak)

    return run


def flexmix(w: Workload) -> Callable[[], Outcome]:
    """flexmix, which starts from responsibilities: those of the common start; its M-step comes first."""
    x, y, q = w.data["x"], w.data["y"], w.start
    n, p = x.shape
    k = len(q["weights"])
    log_joint = -0.5 * ((y[:, None] - x @ q["beta"].T) / q["scale"]) ** 2  # equal weights and scales at the start
    responsibility = np.exp(log_joint - log_joint.max(1, keepdims=True))
    responsibility /= responsibility.sum(1, keepdims=True)
    script = _FLEXMIX.format(n=n, p=p, k=k, steps=w.num_steps)

    def run() -> Outcome:
        flat, seconds, peak = _run_r(script, np.concatenate([x, y[:, None]], 1).T, responsibility.T)
        weights, beta, variance = np.split(flat, [k, k + k * p])
        return Outcome({"weights": weights, "beta": beta.reshape(k, p), "scale": np.sqrt(variance)}, seconds, peak)

    return run


CONTENDERS = (
    Contender("mclust", "full", mclust, (), note="R; its own clock"),
    Contender("flexmix", "regressions", flexmix, (), note="R; its own clock; its scale has a divisor a little below n"),
)
