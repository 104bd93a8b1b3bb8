"""autoem and other libraries on the workloads with continuous latents, and on tomography."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome, stepped
from .contenders_continuous_jax import state_updates
from .workloads import Arrays, Workload


def factor_analysis(x):
    """Independent noise about loadings times factors."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    loadings = numpyro.param("loadings", jnp.zeros((x.shape[1], 8)))
    centre = numpyro.param("centre", jnp.zeros(x.shape[1]))
    variance = numpyro.param("variance", jnp.ones(x.shape[1]), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        f = numpyro.sample("f", dist.Normal(jnp.zeros(8), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(centre + f @ loadings.T, jnp.sqrt(variance)).to_event(1), obs=x)


def seen_in_part(x):
    """A multivariate normal; NaN where nothing was seen."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    d = x.shape[1]
    centre = numpyro.param("centre", jnp.zeros(d))
    scatter = numpyro.param("scatter", jnp.eye(d), constraint=constraints.positive_definite)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(centre, scatter), obs=x)


def state_space(x):
    """Every matrix of the system free."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan
    from numpyro.distributions import constraints

    def matrix(name, size):
        return numpyro.param(name, jnp.eye(size), constraint=constraints.positive_definite)

    n, m = 4, x.shape[1]
    first_mean, first_cov = numpyro.param("first_mean", jnp.zeros(n)), matrix("first_cov", n)
    move, jolt = numpyro.param("move", jnp.eye(n)), matrix("jolt", n)
    read, noise = numpyro.param("read", jnp.zeros((m, n))), matrix("noise", m)

    def step(z, x):
        z = numpyro.sample("z", dist.MultivariateNormal(move @ z, jolt))
        numpyro.sample("x", dist.MultivariateNormal(read @ z, noise), obs=x)
        return z, None

    first = numpyro.sample("first", dist.MultivariateNormal(first_mean, first_cov))
    numpyro.sample("x_first", dist.MultivariateNormal(read @ first, noise), obs=x[0])
    scan(step, first, x[1:])


def tomography(y, index, weight):
    """Rates by a gather along each row."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    activity = numpyro.param("activity", jnp.ones(10_000), constraint=constraints.positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson((weight * activity[index]).sum(1)), obs=y)


MODELS = {"factors": factor_analysis, "holes": seen_in_part, "states": state_space, "tomography": tomography}


def autoem_fit(w: Workload) -> Callable[[], Outcome]:
    """One `EM` object; every fit is a whole `run` of exactly `num_steps` steps from the common start."""
    import jax
    import jax.numpy as jnp

    import autoem

    data = {name: jnp.asarray(x) for name, x in w.data.items()}
    start = {name: jnp.asarray(value) for name, value in w.start.items()}
    options = {"missing": "marginalize"} if w.family == "holes" else {}
    em = autoem.EM(MODELS[w.family], init=start, max_steps=w.num_steps, tol=0.0, progress=False, **options)
    key = jax.random.key(0)

    def run() -> Outcome:
        result = em.run(key, **data)
        if result.num_steps != w.num_steps:
            raise RuntimeError(f"autoem made {result.num_steps} steps in place of {w.num_steps}: {result.status}")
        return Outcome({name: np.asarray(result.params[name]) for name in w.start})

    return run


def sklearn_factors(w: Workload) -> Callable[[], Outcome]:
    """scikit-learn's FactorAnalysis: another algorithm (a fixed point by singular values), so other likelihoods."""
    from sklearn.decomposition import FactorAnalysis
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)
    k = w.start["loadings"].shape[1]

    def run() -> Outcome:
        found = FactorAnalysis(k, svd_method="lapack", tol=0.0, max_iter=w.num_steps).fit(w.data["x"])
        return Outcome({"loadings": found.components_.T, "centre": found.mean_, "variance": found.noise_variance_})

    return run


def numpy_holes(w: Workload) -> Callable[[], Outcome]:
    """Plain NumPy, pattern by pattern, as a statistician writes it."""
    x = w.data["x"]
    patterns, which = np.unique(~np.isnan(x), axis=0, return_inverse=True)
    rows = [np.flatnonzero(which.ravel() == i) for i in range(len(patterns))]

    def step(p: Arrays) -> Arrays:
        centre, scatter = p["centre"], p["scatter"]
        filled, more = x.copy(), np.zeros_like(scatter)
        for own, seen in zip(rows, patterns, strict=True):
            gone = ~seen
            if gone.any():
                slope = np.linalg.solve(scatter[np.ix_(seen, seen)], scatter[np.ix_(seen, gone)]).T
                filled[np.ix_(own, gone)] = centre[gone] + (x[np.ix_(own, seen)] - centre[seen]) @ slope.T
                left = scatter[np.ix_(gone, gone)] - slope @ scatter[np.ix_(seen, gone)]
                more[np.ix_(gone, gone)] += len(own) * left
        new = filled.mean(0)
        return {"centre": new, "scatter": ((filled - new).T @ (filled - new) + more) / len(x)}

    return stepped(w, step)


def dynamax_states(w: Workload) -> Callable[[], Outcome]:
    """dynamax's `fit_em`, compiled once for all fits (of itself it compiles at every call)."""
    import jax
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    s = {name: jnp.asarray(value) for name, value in w.start.items()}
    model = LinearGaussianSSM(*w.start["read"].shape[::-1], has_dynamics_bias=False, has_emissions_bias=False)
    params, learnt = model.initialize(
        jax.random.PRNGKey(0), initial_mean=s["first_mean"], initial_covariance=s["first_cov"],
        dynamics_weights=s["move"], dynamics_covariance=s["jolt"], emission_weights=s["read"],
        emission_covariance=s["noise"],
    )  # fmt: skip
    x = jnp.asarray(w.data["x"])
    fit = jax.jit(lambda p, x: model.fit_em(p, learnt, x, num_iters=w.num_steps, verbose=False)[0])

    def run() -> Outcome:
        found = jax.block_until_ready(fit(params, x))
        out = {"first_mean": found.initial.mean, "first_cov": found.initial.cov, "move": found.dynamics.weights}
        out |= {"jolt": found.dynamics.cov, "read": found.emissions.weights, "noise": found.emissions.cov}
        return Outcome({name: np.asarray(value) for name, value in out.items()})

    return run


def statsmodels_states(w: Workload) -> Callable[[], Outcome]:
    """statsmodels' smoother, compiled and with gains that settle, and the updates of EM in NumPy about it."""
    from statsmodels.tsa.statespace import kalman_smoother as smoother

    x = w.data["x"]
    m, n = w.start["read"].shape
    wanted = smoother.SMOOTHER_STATE | smoother.SMOOTHER_STATE_COV | smoother.SMOOTHER_STATE_AUTOCOV
    space = smoother.KalmanSmoother(m, n, n, smoother_output=wanted)
    space.bind(x)
    space["selection"] = np.eye(n)

    def step(p: Arrays) -> Arrays:
        space["design"], space["transition"] = p["read"], p["move"]
        space["state_cov"], space["obs_cov"] = p["jolt"], p["noise"]
        space.initialize_known(p["first_mean"], p["first_cov"])
        found = space.smooth()
        covs, across = found.smoothed_state_cov, found.smoothed_state_autocov[:, :, :-1].sum(2)
        return state_updates(np, x, found.smoothed_state.T, covs[:, :, 0], covs[:, :, -1], covs.sum(2), across)

    return stepped(w, step)


def statsmodels_factors(w: Workload) -> Callable[[], Outcome]:
    """statsmodels' maximum likelihood of factors, by a quasi-Newton search on the correlations: few long steps."""
    from statsmodels.multivariate.factor import Factor

    x = w.data["x"]
    k = w.start["loadings"].shape[1]

    def run() -> Outcome:
        found = Factor(x, n_factor=k, method="ml").fit(maxiter=w.num_steps)
        spread = x.std(0)
        return Outcome(
            {
                "loadings": spread[:, None] * found.loadings,
                "centre": x.mean(0),
                "variance": spread**2 * found.uniqueness,
            }
        )

    return run


def scipy_tomography(w: Workload) -> Callable[[], Outcome]:
    """Two products with a sparse matrix of SciPy a step."""
    y, system = w.data["y"], sparse_rows(w.data)
    back, seen = system.T.tocsr(), np.asarray(system.sum(0)).ravel()

    def step(p: Arrays) -> Arrays:
        x = p["activity"]
        return {"activity": x / seen * (back @ (y / (system @ x)))}

    return stepped(w, step)


def sparse_rows(data: Arrays):
    """The system as a SciPy matrix, entries of one place added up."""
    from scipy.sparse import coo_matrix

    index, weight = data["index"], data["weight"]
    rows = np.repeat(np.arange(len(index)), index.shape[1])
    return coo_matrix((weight.ravel(), (rows, index.ravel())), shape=(len(index), 10_000)).tocsr()


_IMPORTS = ("jax.numpy", "numpyro", "autoem")
CONTENDERS = (
    *(
        Contender(name, family, autoem_fit, _IMPORTS, devices, "autoem")
        for family in MODELS
        for name, devices in (("autoem-1", 1), ("autoem-all", CORES))
    ),
    Contender("sklearn", "factors", sklearn_factors, ("sklearn.decomposition",), note="another algorithm"),
    Contender(
        "statsmodels", "factors", statsmodels_factors, ("statsmodels.multivariate.factor",), note="another algorithm"
    ),
    Contender("numpy", "holes", numpy_holes, ("numpy",)),
    Contender("dynamax", "states", dynamax_states, ("dynamax.linear_gaussian_ssm",), 1, note="compiled once"),
    Contender("statsmodels", "states", statsmodels_states, ("statsmodels.tsa.statespace.kalman_smoother",)),
    Contender("scipy", "tomography", scipy_tomography, ("scipy.sparse",)),
)
