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
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

RNG = np.random.default_rng(7)
POSITIVE, COVARIANCE = constraints.positive, constraints.positive_definite

N, GROUPS = 14, 4
GROUP = np.array([0, 2, 1, 0, 3, 3, 1, 2, 0, 1, 2, 3, 0, 1])
SECOND = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 2, 1, 0, 1])  # crosses GROUP
SCHOOL = np.array([0, 0, 1, 1])  # of every group: nested
X = RNG.normal(size=N)
Y = 1.0 + 0.5 * X + np.array([0.8, -0.9, 0.2, 1.4])[GROUP] + 0.5 * RNG.normal(size=N)
ROWS = RNG.normal(size=(6, 3)) @ RNG.normal(size=(3, 3)) + RNG.normal(size=3)
OTHER = ROWS[:, :2] + 0.5 * RNG.normal(size=(6, 2))
PATH = np.cumsum(RNG.normal(size=9)) + 0.6 * RNG.normal(size=9)
PATHS = np.cumsum(RNG.normal(size=(6, 3)), 0) + 0.5 * RNG.normal(size=(6, 3))  # (steps, dimensions) or (steps, series)
INPUT = RNG.normal(size=9)
W32 = np.array([[0.9, 0.2], [-0.4, 0.7], [0.3, 0.5]])
A22 = np.array([[0.8, 0.15], [-0.1, 0.6]])
S22 = np.array([[0.9, 0.2], [0.2, 0.5]])


class Case(NamedTuple):
    """A model and its data.

    `settled` names parameters that one step brings to where the gradient of `Q` is zero whatever the others do;
    `weights` counts the rows of a model whose rows are independent and scaled; `reverse` names what runs backwards.
    """

    model: Callable
    args: tuple
    settled: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    reverse: tuple[str, ...] = ()


def param(name: str, value: Any, constraint: Any = constraints.real) -> Any:
    return numpyro.param(name, jnp.asarray(value, float), constraint=constraint)


def normal(name: str, loc: Any, scale: Any, obs: Any = None) -> Any:
    return numpyro.sample(name, dist.Normal(loc, scale), obs=obs)


def vector(name: str, loc: Any, scale: Any, obs: Any = None) -> Any:
    return numpyro.sample(name, dist.Normal(loc, scale).to_event(1), obs=obs)


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
    scatter, sd = param("scatter", S22, COVARIANCE), param("sd", 0.6, POSITIVE)
    fixed = line(x)
    with numpyro.plate("groups", GROUPS):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scatter))
    with numpyro.plate("rows", len(y)):
        normal("y", fixed + b[group, 0] + b[group, 1] * x, sd, y)


def mean_of_effects(y, x, group):
    """The effects hold their own mean, and the covariance is given by its factor."""
    beta, sd = param("beta", [0.7, 0.3]), param("sd", 0.6, POSITIVE)
    root = param("root", np.linalg.cholesky(S22), constraints.lower_cholesky)
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
    return param("mu", np.zeros(d)), param("w", W32[:d, :q])


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


def weighted_factors(rows, weight):
    (mu, w), sd = loadings(), param("sd", 0.7, POSITIVE)
    with numpyro.plate("rows", len(rows)), handlers.scale(scale=weight):
        f = vector("f", jnp.zeros(2), 1.0)
        vector("x", mu + f @ w.T, sd, rows)


def canonical_correlation(rows, other):
    (mu, w), v = loadings(), param("v", [[0.5, -0.3], [0.4, 0.6]])
    nu, cov = param("nu", np.zeros(2)), param("cov", S22, COVARIANCE)
    psi = param("psi", [0.5, 0.8, 0.6], POSITIVE)
    with numpyro.plate("rows", len(rows)):
        f = vector("f", jnp.zeros(2), 1.0)
        vector("x", mu + f @ w.T, psi, rows)
        numpyro.sample("y", dist.MultivariateNormal(nu + f @ v.T, cov), obs=other)


def mixture_of_factor_analysers(rows):
    shares = param("shares", [0.6, 0.4], constraints.simplex)
    mu, w = param("mu", [[0.0, 0.2, -0.3], [1.0, -1.0, 0.5]]), param("w", np.stack([W32[:, :1], -W32[:, 1:]]))
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


# state space


def local_level(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    first = normal("first", 0.0, 3.0)

    def step(level, seen):
        level = normal("level", level, move)
        normal("y", level, sd, seen)
        return level, None

    scan(step, first, y)


def trend(y):
    move, bend, sd = param("move", 0.8, POSITIVE), param("bend", 0.4, POSITIVE), param("sd", 0.6, POSITIVE)
    start = normal("level0", 0.0, 3.0), normal("slope0", 0.0, 1.0)

    def step(carry, seen):
        level, slope = carry
        level, slope = normal("level", level + slope, move), normal("slope", slope, bend)
        normal("y", level, sd, seen)
        return (level, slope), None

    scan(step, start, y)


def second_order(y):
    phi, move, sd = param("phi", [0.5, 0.2]), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        one, two = carry
        now = normal("x", phi[0] * one + phi[1] * two, move)
        normal("y", now, sd, seen)
        return (now, one), None

    scan(step, (0.0, 0.0), y)


def vector_state(y):
    a, c, q = param("a", A22), param("c", W32), param("q", S22, COVARIANCE)
    r, m0 = param("r", [0.5, 0.8, 0.6], POSITIVE), param("m0", np.zeros(2))
    start = numpyro.sample("start", dist.MultivariateNormal(m0, jnp.eye(2)))

    def step(x, seen):
        x = numpyro.sample("x", dist.MultivariateNormal(a @ x, q))
        vector("y", c @ x, r, seen)
        return x, None

    scan(step, start, y)


def full_noise(y):
    a, q, r = param("a", A22), param("q", [0.7, 0.5], POSITIVE), param("r", np.eye(3) * 0.5 + 0.1, COVARIANCE)

    def step(x, seen):
        x = vector("x", a @ x, q)
        numpyro.sample("y", dist.MultivariateNormal(W32 @ x, r), obs=seen)
        return x, None

    scan(step, jnp.zeros(2), y)


def dynamic_regression(y, x):
    move, sd, alpha = param("move", 0.5, POSITIVE), param("sd", 0.6, POSITIVE), param("alpha", 0.1)
    first = normal("first", 0.0, 2.0)

    def step(beta, now):
        seen, x = now
        beta = normal("beta", beta, move)
        normal("y", alpha + beta * x, sd, seen)
        return beta, None

    scan(step, first, (y, x))


def driven(y, x):
    """An input moves the state; the observation before enters the next."""
    phi, gain, rho = param("phi", 0.7), param("gain", 0.4), param("rho", 0.2)
    move, sd = param("move", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, now):
        level, last = carry
        seen, x = now
        level = normal("level", phi * level + gain * x, move)
        last = normal("y", level + rho * last, sd, seen)
        return (level, last), None

    scan(step, (0.0, 0.0), (y, x))


def series(y):
    phi, move, sd = param("phi", 0.7), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, seen):
        with numpyro.plate("series", y.shape[1]):
            x = normal("x", phi * x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), y)


def series_with_own_start(y):
    mu, move, sd = param("mu", 0.2), param("move", 0.8, POSITIVE), param("sd", [0.6, 0.9, 0.7], POSITIVE)
    with numpyro.plate("series", y.shape[1]):
        first = normal("first", mu, 1.2)

    def step(x, seen):
        with numpyro.plate("series", y.shape[1]):
            x = normal("x", x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, first, y)


def backwards(y):
    phi, move, sd = param("phi", 0.7), param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(x, seen):
        x = normal("x", phi * x, move)
        normal("y", x, sd, seen)
        return x, None

    scan(step, 0.0, y, reverse=True)


def loop(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    x = normal("x0", 0.0, 2.0)
    for t in range(len(y)):
        x = normal(f"x{t}", x, move) if t else x
        normal(f"y{t}", x, sd, y[t])


def with_holes(data: np.ndarray, *holes: Any) -> np.ndarray:
    out = data.copy()
    for hole in holes:
        out[hole] = np.nan
    return out


DROP = {"missing": "marginalize"}
ROWS_ = (Y, X, GROUP)
WEIGHT = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 0.5])
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
    "local level": Case(local_level, (PATH,), ("move", "sd")),
    "trend": Case(trend, (PATH,), ("move", "bend", "sd")),
    "second order": Case(second_order, (PATH,), ("phi", "move", "sd")),
    "vector state": Case(vector_state, (PATHS,), ("a", "c", "q", "r", "m0")),
    "full noise": Case(full_noise, (PATHS,), ("a", "q", "r")),
    "dynamic regression": Case(dynamic_regression, (PATH, INPUT), ("move", "alpha", "sd")),
    "driven": Case(driven, (PATH, INPUT), ("phi", "gain", "rho", "move", "sd")),
    "series": Case(series, (PATHS,), ("phi", "move", "sd")),
    "series with own start": Case(series_with_own_start, (PATHS,), ("mu", "move", "sd")),
    "backwards": Case(backwards, (PATH,), ("phi", "move", "sd"), {}, ("x",)),
    "steps not seen": Case(trend, (with_holes(PATH, 0, 3, 4, 8),), ("move", "bend"), DROP),
    "series with holes": Case(series, (with_holes(PATHS, (1, 2), (2, 2), (5, 0)),), ("phi", "move"), DROP),
    "loop": Case(loop, (PATH[:5],), ("move", "sd"), {"latent": ["x0"]}),
}
WEIGHTED = Case(weighted_factors, (ROWS, WEIGHT))
