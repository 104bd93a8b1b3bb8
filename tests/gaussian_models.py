"""Small models with Gaussian latents, as users write them: enter one here and `laws/test_gaussian.py` tests it.

A case is a model, its data, the parameters at which it is looked at, and what may be asked of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

from tests import normal_law_models as laws
from tests import state_space_models as chains
from tests.state_space_models import COVARIANCE, LOADINGS, POSITIVE, SCATTER, normal, param, vector

RNG = np.random.default_rng(7)

N, GROUPS = 14, 4
GROUP = np.array([0, 2, 1, 0, 3, 3, 1, 2, 0, 1, 2, 3, 0, 1])
SECOND = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 2, 1, 0, 1])  # crosses GROUP
WEEK = np.array([0, 0, 1, 4, 4, 4, 2, 1, 0, 2, 2, 4, 1, 0])  # of five, the fourth without a row
AREA = np.array([0, 2, 1, 5, 3, 4, 1, 2, 0, 5, 2, 3, 0, 1])
SCHOOL = np.array([0, 0, 1, 1])  # of every group: nested
X = RNG.normal(size=N)
Y = 1.0 + 0.5 * X + np.array([0.8, -0.9, 0.2, 1.4])[GROUP] + 0.5 * RNG.normal(size=N)
ROWS = RNG.normal(size=(6, 3)) @ RNG.normal(size=(3, 3)) + RNG.normal(size=3)
OTHER = ROWS[:, :2] + 0.5 * RNG.normal(size=(6, 2))
PATH = np.cumsum(RNG.normal(size=9)) + 0.6 * RNG.normal(size=9)
PATHS = np.cumsum(RNG.normal(size=(6, 3)), 0) + 0.5 * RNG.normal(size=(6, 3))  # (steps, dimensions) or (steps, series)
INPUT = RNG.normal(size=9)


class Case(NamedTuple):
    """A model and its data.

    `settled` names parameters that one step brings to where the gradient of `Q` is zero; `options` go to `EM`;
    `reverse` names what runs backwards.
    """

    model: Callable
    args: tuple
    settled: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    reverse: tuple[str, ...] = ()


# random effects


def line(x):
    beta = param("beta", [0.7, 0.3])
    return beta[0] + beta[1] * x


def random_intercept(y, x, group):
    between, sd = param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", 0.0, between)
    with numpyro.plate("rows", len(y)):
        normal("y", line(x) + u[group], sd, y)


def random_slopes(y, x, group):
    scatter, sd = param("scatter", SCATTER, COVARIANCE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scatter))
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + b[group, 0] + b[group, 1] * x, sd, y)


def mean_of_effects(y, x, group):
    """The effects hold their own mean, and the covariance is given by its factor."""
    beta, sd = param("beta", [0.7, 0.3]), param("sd", 0.6, POSITIVE)
    root = param("root", np.linalg.cholesky(SCATTER), constraints.lower_cholesky)
    with numpyro.plate("groups", GROUPS):
        b = numpyro.sample("b", dist.MultivariateNormal(beta, scale_tril=root))
    with numpyro.plate("rows", len(y)):
        normal("y", b[group, 0] + b[group, 1] * x, sd, y)


def two_sites(y, x, group):
    u_sd, v_sd, sd = param("u_sd", 0.8, POSITIVE), param("v_sd", 0.4, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        u, v = normal("u", 0.0, u_sd), normal("v", 0.0, v_sd)
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + u[group] + v[group] * x, sd, y)


def nested(y, x, group, school):
    top, mid, sd = param("top", 0.7, POSITIVE), param("mid", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("schools", 2):
        a = normal("a", 0.0, top)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", a[school], mid)
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + u[group], sd, y)


def nested_by_rows(y, x, group, school):
    top, mid, sd = param("top", 0.7, POSITIVE), param("mid", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("schools", 2):
        a = normal("a", 0.0, top)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", 0.0, mid)
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + a[school[group]] + u[group], sd, y)


def crossed(y, x, first, second):
    one, two, sd = param("one", 0.8, POSITIVE), param("two", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("firsts", GROUPS):
        u = normal("u", 0.0, one)
    with numpyro.plate("seconds", 3):
        v = normal("v", 0.0, two)
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + u[first] + v[second], sd, y)


def not_centred(y, x, group):
    mean, between, sd = param("mean", 0.5), param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("groups", GROUPS):
        e = normal("e", 0.0, 1.0)
    with numpyro.plate("rows", len(y)):
        normal("y", mean + between * e[group], sd, y)


def by_plates(y):
    """Groups as rows of a matrix, no index."""
    mean, between, sd = param("mean", 0.5), param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("groups", y.shape[0], dim=-2):
        u = normal("u", mean, between)
        with numpyro.plate("rows", y.shape[1], dim=-1):
            normal("y", u, sd, y)


def log_normal(y, x, group):
    between, sd = param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", 0.0, between)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.LogNormal(fixed + u[group], sd), obs=y)


def masked(y, x, group, seen):
    between, sd = param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", 0.0, between)
    with numpyro.plate("rows", len(y)), handlers.mask(mask=seen):
        normal("y", fixed + u[group], sd, y)


def weighted_rows(y, x, group, weight):
    between, sd = param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        u = normal("u", 0.0, between)
    with numpyro.plate("rows", len(y)), handlers.scale(scale=weight):
        normal("y", fixed + u[group], sd, y)


# factors


def loadings(d=3, q=2):
    return param("mu", np.zeros(d)), param("w", LOADINGS[:d, :q])


def factor_analysis(rows):
    (mu, w), psi = loadings(), param("psi", [0.5, 0.8, 0.6], POSITIVE)
    with numpyro.plate("rows", len(rows)):
        f = vector("f", jnp.zeros(2), 1.0)
        vector("x", mu + f @ w.T, jnp.sqrt(psi), rows)


def principal_components(rows):
    (mu, w), sd = loadings(), param("sd", 0.7, POSITIVE)
    with numpyro.plate("rows", len(rows)):
        f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
        vector("x", mu + (w @ f[..., None])[..., 0], sd, rows)


def masked_factors(rows, seen):
    (mu, w), sd = loadings(), param("sd", 0.7, POSITIVE)
    with numpyro.plate("rows", len(rows)), handlers.mask(mask=seen):
        f = vector("f", jnp.zeros(2), 1.0)
        vector("x", mu + f @ w.T, sd, rows)


def canonical_correlation(rows, other):
    (mu, w), v = loadings(), param("v", [[0.5, -0.3], [0.4, 0.6]])
    nu, cov = param("nu", np.zeros(2)), param("cov", SCATTER, COVARIANCE)
    psi = param("psi", [0.5, 0.8, 0.6], POSITIVE)
    with numpyro.plate("rows", len(rows)):
        f = vector("f", jnp.zeros(2), 1.0)
        vector("x", mu + f @ w.T, psi, rows)
        numpyro.sample("y", dist.MultivariateNormal(nu + f @ v.T, cov), obs=other)


def mixture_of_factor_analysers(rows):
    shares = param("shares", [0.6, 0.4], constraints.simplex)
    mu, w = param("mu", [[0.0, 0.2, -0.3], [1.0, -1.0, 0.5]]), param("w", np.stack([LOADINGS[:, :1], -LOADINGS[:, 1:]]))
    psi = param("psi", [[0.5, 0.8, 0.6], [0.9, 0.6, 0.7]], POSITIVE)
    with numpyro.plate("rows", len(rows)):
        z = numpyro.sample("z", dist.Categorical(shares))
        f = vector("f", jnp.zeros(1), 1.0)
        vector("x", mu[z] + jnp.einsum("...dq,...q->...d", w[z], f), psi[z], rows)


def switched_effect(y):
    """A discrete latent moves the mean of a continuous one."""
    shares, loc = param("shares", [0.6, 0.4], constraints.simplex), param("loc", [-1.0, 1.5])
    spread, sd = param("spread", [0.5, 0.9], POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(shares))
        u = normal("u", loc[z], spread[z])
        normal("y", u, sd, y)


def error_in_x(y, seen):
    """Regression on a covariate that was measured with error, whose size is known."""
    mu, tau, sd = param("mu", 0.1), param("tau", 0.9, POSITIVE), param("sd", 0.6, POSITIVE)
    beta = param("beta", [0.7, 0.3])
    with numpyro.plate("rows", len(y)):
        x = normal("x", mu, tau)
        normal("seen", x, 0.5, seen)
        normal("y", beta[0] + beta[1] * x, sd, y)


def one_latent(y, x):
    """One latent for all rows, a mean with a prior that is learnt."""
    spread, sd = param("spread", 1.5, POSITIVE), param("sd", 0.6, POSITIVE)
    u = normal("u", 0.0, spread)
    with numpyro.plate("rows", len(y)):
        normal("y", u + 0.5 * x, sd, y)


def gaussian_process(y, t):
    length, height, sd = param("length", 0.4, POSITIVE), param("height", 1.0, POSITIVE), param("sd", 0.5, POSITIVE)
    kernel = height**2 * jnp.exp(-0.5 * (t[:, None] - t) ** 2 / length**2) + 1e-6 * jnp.eye(len(t))
    f = numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(len(t)), kernel))
    with numpyro.plate("rows", len(t)):
        normal("y", f, sd, y)


def with_holes(data: np.ndarray, *holes: Any) -> np.ndarray:
    out = data.copy()
    for hole in holes:
        out[hole] = np.nan
    return out


DROP = {"missing": "marginalize"}
ROWS_ = (Y, X, GROUP)
CASES = {
    "random intercept": Case(random_intercept, ROWS_, ("beta", "between", "sd")),
    "random slopes": Case(random_slopes, ROWS_, ("beta", "scatter", "sd")),
    "mean of effects": Case(mean_of_effects, ROWS_, ("beta", "root", "sd")),
    "two sites": Case(two_sites, ROWS_, ("beta", "u_sd", "v_sd", "sd")),
    "nested": Case(nested, (*ROWS_, SCHOOL), ("beta", "top", "mid", "sd")),
    "nested by rows": Case(nested_by_rows, (*ROWS_, SCHOOL), ("beta", "top", "mid", "sd")),
    "crossed": Case(crossed, (*ROWS_, SECOND), ("beta", "one", "two", "sd")),
    "not centred": Case(not_centred, ROWS_),
    "by plates": Case(by_plates, (Y.reshape(2, 7),), ("mean", "between", "sd")),
    "log normal": Case(log_normal, (np.exp(0.3 * Y), X, GROUP), ("beta", "between", "sd")),
    "masked": Case(masked, (*ROWS_, X > -0.7), ("beta", "between", "sd")),
    "weighted rows": Case(weighted_rows, (*ROWS_, 1.0 + (X > 0)), ("beta", "between", "sd")),
    "rows not seen": Case(random_slopes, (with_holes(Y, 2, 5, 6), X, GROUP), ("scatter",), DROP),
    "factor analysis": Case(factor_analysis, (ROWS,), ("mu", "w", "psi")),
    "principal components": Case(principal_components, (ROWS,), ("mu", "w", "sd")),
    "factors with holes": Case(factor_analysis, (with_holes(ROWS, (0, 1), (3, 2), (3, 0), 4),), (), DROP),
    "canonical correlation": Case(canonical_correlation, (ROWS, OTHER), ("mu", "w", "v", "nu", "cov", "psi")),
    "mixture of factor analysers": Case(mixture_of_factor_analysers, (ROWS[:5],), ("shares", "mu", "w", "psi")),
    "switched effect": Case(switched_effect, (Y[:6],), ("shares", "loc", "spread", "sd")),
    "error in x": Case(error_in_x, (Y, X), ("mu", "tau", "beta", "sd")),
    "one latent": Case(one_latent, (Y, X), ("spread", "sd")),
    "Gaussian process": Case(gaussian_process, (PATH, np.linspace(0, 1, 9)), ("sd",)),
    "local level": Case(chains.local_level, (PATH,), ("move", "sd")),
    "trend": Case(chains.trend, (PATH,), ("move", "bend", "sd")),
    "second order": Case(chains.second_order, (PATH,), ("phi", "move", "sd")),
    "vector state": Case(chains.vector_state, (PATHS,), ("a", "c", "q", "r", "m0")),
    "full noise": Case(chains.full_noise, (PATHS,), ("a", "q", "r")),
    "dynamic regression": Case(chains.dynamic_regression, (PATH, INPUT), ("move", "alpha", "sd")),
    "driven": Case(chains.driven, (PATH, INPUT), ("phi", "gain", "rho", "move", "sd")),
    "series": Case(chains.series, (PATHS,), ("phi", "move", "sd")),
    "series with own start": Case(chains.series_with_own_start, (PATHS,), ("mu", "move", "sd")),
    "backwards": Case(chains.backwards, (PATH,), ("phi", "move", "sd"), {}, ("x",)),
    "steps not seen": Case(chains.trend, (with_holes(PATH, 0, 3, 4, 8),), ("move", "bend"), DROP),
    "series with holes": Case(chains.series, (with_holes(PATHS, (1, 2), (2, 2), (5, 0)),), ("phi", "move"), DROP),
    "random walk": Case(laws.random_walk, (PATH,), ("move", "sd")),
    "walk by week": Case(laws.walk_by_week, (Y, WEEK), ("move", "mu", "sd")),
    "walks": Case(laws.walks, (PATHS,), ("move", "sd")),
    "masked walk": Case(laws.masked_walk, (PATH, np.arange(9) % 3 > 0), ("move", "sd")),
    "spline": Case(laws.spline, (PATH,), ("move", "sd")),
    "two walks": Case(laws.two_walks, (PATH, INPUT), ("one", "two", "sd")),
    "state space": Case(laws.state_space, (PATH,), ("a", "q", "sd")),
    "areas": Case(laws.areas, (Y, AREA), ("rho", "sd")),
    "areas by year": Case(laws.areas_by_year, (RNG.normal(size=(3, 6)),), ("rho", "sd")),
    "by precision": Case(laws.by_precision, (PATH,), ("precision", "sd")),
    "low rank": Case(laws.low_rank, (ROWS,), ("w", "own", "sd")),
    "matrix": Case(laws.matrix, (PATHS[:3, :2],), ("root", "sd")),
    "moved and stretched": Case(laws.moved_and_stretched, ROWS_, ("mean", "between", "sd")),
    "mean reverting": Case(laws.mean_reverting, (PATH,), ("pull", "sd")),
    "unseen law": Case(laws.unseen, (PATH,), ("spread", "shared", "sd")),
    "restricted": Case(laws.restricted, ROWS_, ("scatter", "sd"), {"latent": ["beta"]}),
    "flat by group": Case(laws.flat_by_group, ROWS_, ("slope", "sd"), {"latent": ["u"]}),
    "diffuse trend": Case(laws.diffuse_trend, (with_holes(PATH, 0, 1, 5),), ("move", "bend"), DROP),
    "diffuse state": Case(laws.diffuse_state, (PATH,), ("q", "sd")),
    "diffuse series": Case(laws.diffuse_series, (PATHS,), ("move", "sd")),
    "loop": Case(chains.loop, (PATH[:5],), ("move", "sd"), {"latent": ["x0"]}),
}
