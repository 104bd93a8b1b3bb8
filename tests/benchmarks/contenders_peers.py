"""Other Python libraries, near their defaults, made to start where everybody starts and to run every step.

em4gmm (a C program) is on no package index and is not run. mclust and flexmix are in `contenders_r`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome, stepped
from .workloads import Workload


def sklearn_mixture(w: Workload) -> Callable[[], Outcome]:
    """scikit-learn's GaussianMixture, with no regularisation and a tolerance that never stops it."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    full = w.family == "full"
    precisions = np.linalg.inv(w.start["cov"]) if full else w.start["scale"] ** -2
    warnings.simplefilter("ignore", ConvergenceWarning)

    def run() -> Outcome:
        mixture = GaussianMixture(
            len(w.start["weights"]),
            covariance_type="full" if full else "diag",
            tol=0.0,
            reg_covar=0.0,
            max_iter=w.num_steps,
            weights_init=w.start["weights"],
            means_init=w.start["loc"],
            precisions_init=precisions,
        ).fit(w.data["x"])
        spread = {"cov": mixture.covariances_} if full else {"scale": np.sqrt(mixture.covariances_)}
        return Outcome({"weights": mixture.weights_, "loc": mixture.means_, **spread})

    return run


def pomegranate_mixture(w: Workload) -> Callable[[], Outcome]:
    """pomegranate's GeneralMixtureModel in float64, torch on every core."""
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    torch.set_num_threads(CORES)
    torch.set_default_dtype(torch.float64)
    x = torch.tensor(w.data["x"])

    def run() -> Outcome:
        components = [
            Normal(torch.tensor(m), torch.tensor(c), covariance_type="full")
            for m, c in zip(w.start["loc"], w.start["cov"], strict=True)
        ]
        weights = torch.tensor(w.start["weights"])
        mixture = GeneralMixtureModel(components, priors=weights, max_iter=w.num_steps, tol=-1e300).fit(x)
        loc = np.stack([c.means.numpy() for c in mixture.distributions])
        cov = np.stack([c.covs.numpy() for c in mixture.distributions])
        return Outcome({"weights": mixture.priors.numpy(), "loc": loc, "cov": cov})

    return run


def stepmix_classes(w: Workload) -> Callable[[], Outcome]:
    """StepMix's `binary_nan` measurement model, its random start overwritten by the common one."""
    from stepmix import StepMix

    x = w.data["x"]

    def fresh() -> StepMix:
        model = StepMix(
            len(w.start["weights"]),
            measurement="binary_nan",
            n_init=1,
            max_iter=w.num_steps,
            abs_tol=0.0,
            rel_tol=0.0,
            random_state=0,
            progress_bar=0,
            verbose=0,
        )
        initialise = model._initialize_parameters

        def common_start(*args, **kwargs):
            initialise(*args, **kwargs)
            model.weights_ = w.start["weights"].copy()
            own = model._mm.parameters["pis"]
            model._mm.parameters["pis"] = _oriented(w.start["theta"], own.shape).copy()

        model._initialize_parameters = common_start
        return model

    def run() -> Outcome:
        model = fresh().fit(x)
        theta = _oriented(model._mm.parameters["pis"], w.start["theta"].shape)
        return Outcome({"weights": model.weights_, "theta": theta})

    return run


def _oriented(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`table` or its transpose, whichever has `shape`: versions of StepMix differ in this."""
    return table if table.shape == shape else table.T


def numpy_regressions(w: Workload) -> Callable[[], Outcome]:
    """Plain NumPy, as a statistician writes it."""
    from scipy.special import logsumexp

    x, y = w.data["x"], w.data["y"]

    def step(q: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        residual = (y[:, None] - x @ q["beta"].T) / q["scale"]
        log_joint = -0.5 * residual**2 - np.log(q["scale"]) + np.log(q["weights"])
        r = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
        counts = r.sum(0)
        beta = np.stack([np.linalg.solve((x * c[:, None]).T @ x, x.T @ (c * y)) for c in r.T])
        variance = (r * (y[:, None] - x @ beta.T) ** 2).sum(0) / counts
        return {"weights": counts / len(y), "beta": beta, "scale": np.sqrt(variance)}

    return stepped(w, step)


CONTENDERS = (
    Contender("sklearn", "full", sklearn_mixture, ("sklearn.mixture",), note="reg_covar=0, tol=0"),
    Contender("sklearn", "diagonal", sklearn_mixture, ("sklearn.mixture",), note="reg_covar=0, tol=0"),
    Contender("pomegranate", "full", pomegranate_mixture, ("torch", "pomegranate.gmm"), note="float64, torch"),
    Contender("stepmix", "classes", stepmix_classes, ("stepmix",), note="start overwritten after its own"),
    Contender("numpy", "regressions", numpy_regressions, ("scipy.special",)),
)
