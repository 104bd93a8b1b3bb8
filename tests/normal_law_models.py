"""Small models whose latents have a normal law by another name than Normal; `tests/gaussian_models.py` lists them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

from tests.state_space_models import COVARIANCE, LOADINGS, MOVES, POSITIVE, SCATTER, normal, param

UNIT = constraints.unit_interval
BORDERS = np.array([  # an irregular map: areas have one to four neighbours
    [0, 1, 1, 0, 0, 0],
    [1, 0, 1, 1, 0, 0],
    [1, 1, 0, 1, 1, 0],
    [0, 1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0, 1],
    [0, 0, 0, 0, 1, 0],
])  # fmt: skip
BASIS = np.maximum(0, 1 - np.abs(np.linspace(0, 4, 9)[:, None] - np.arange(5)))  # hats: rows read two of five


def random_walk(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    x = numpyro.sample("x", dist.GaussianRandomWalk(move, len(y)))
    with numpyro.plate("rows", len(y)):
        normal("y", x, sd, y)


def walk_by_week(y, week, count=5):
    """Some weeks have several rows, and one has none."""
    move, sd, mu = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE), param("mu", 0.3)
    x = numpyro.sample("x", dist.GaussianRandomWalk(move, count))
    with numpyro.plate("rows", len(y)):
        normal("y", mu + x[week], sd, y)


def walks(y):
    """A walk for each series, with moves of its own; rows are steps and series."""
    move, sd = param("move", [0.8, 0.5, 0.3], POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("series", y.shape[1]):
        x = numpyro.sample("x", dist.GaussianRandomWalk(move, y.shape[0]))
    with numpyro.plate("columns", y.shape[1], dim=-1), numpyro.plate("rows", y.shape[0], dim=-2):
        normal("y", x.T, sd, y)


def masked_walk(y, seen):
    """A mask around some of the rows, another around the walk's own site, which takes nothing out."""
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    with handlers.mask(mask=True):
        x = numpyro.sample("x", dist.GaussianRandomWalk(move, len(y)))
    with numpyro.plate("rows", len(y)), handlers.mask(mask=seen):
        normal("y", x, sd, y)


def spline(y):
    """Rows read several steps of a walk, which is then one vector."""
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    x = numpyro.sample("x", dist.GaussianRandomWalk(move, BASIS.shape[1]))
    with numpyro.plate("rows", len(y)):
        normal("y", BASIS @ x, sd, y)


def two_walks(y, x):
    one, two, sd = param("one", 0.8, POSITIVE), param("two", 0.4, POSITIVE), param("sd", 0.6, POSITIVE)
    level = numpyro.sample("level", dist.GaussianRandomWalk(one, len(y)))
    slope = numpyro.sample("slope", dist.GaussianRandomWalk(two, len(y)))
    with numpyro.plate("rows", len(y)):
        normal("y", level + slope * x, sd, y)


def state_space(y):
    a, q, sd = param("a", MOVES), param("q", SCATTER, COVARIANCE), param("sd", 0.6, POSITIVE)
    x = numpyro.sample("x", dist.GaussianStateSpace(len(y), a, covariance_matrix=q, initial_value=jnp.array([0.5, 0])))
    with numpyro.plate("rows", len(y)):
        normal("y", x[:, 0] + 0.5 * x[:, 1], sd, y)


def areas(y, area):
    rho, tau = param("rho", 0.6, UNIT), param("tau", 1.5, POSITIVE)
    mu, sd = param("mu", 0.3), param("sd", 0.6, POSITIVE)
    phi = numpyro.sample("phi", dist.CAR(mu, rho, tau, BORDERS.astype(float)))
    with numpyro.plate("rows", len(y)):
        normal("y", phi[area], sd, y)


def areas_by_year(y):
    """A law of its own for each year, with parameters shared."""
    rho, tau, sd = param("rho", 0.6, UNIT), param("tau", 1.5, POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("years", y.shape[0]):
        phi = numpyro.sample("phi", dist.CAR(0.0, rho, tau, BORDERS.astype(float)))
        numpyro.sample("y", dist.Normal(phi, sd).to_event(1), obs=y)


def by_precision(y):
    precision, sd = param("precision", np.eye(9) * 2 - 0.1, COVARIANCE), param("sd", 0.6, POSITIVE)
    x = numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(9), precision_matrix=precision))
    with numpyro.plate("rows", len(y)):
        normal("y", x, sd, y)


def low_rank(y):
    """The law of each row's latent, and what is seen of it, have a covariance of low rank and a diagonal."""
    w, own, sd = param("w", LOADINGS), param("own", [0.5, 0.8, 0.6], POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", dist.LowRankMultivariateNormal(jnp.zeros(3), w, own))
        numpyro.sample("y", dist.LowRankMultivariateNormal(x, 0.3 * jnp.ones((3, 1)), sd * jnp.ones(3)), obs=y)


def matrix(y):
    root = param("root", np.eye(3) + 0.2 * np.eye(3, k=-1), constraints.lower_cholesky)
    sd, mu = param("sd", 0.6, POSITIVE), param("mu", 0.2)
    across = jnp.asarray(np.linalg.cholesky(SCATTER))
    x = numpyro.sample("x", dist.MatrixNormal(mu * jnp.ones((3, 2)), root, across))
    with numpyro.plate("columns", 2), numpyro.plate("rows", 3):
        normal("y", x, sd, y)


def circle(y):
    """A law that is the same all around, given by the first row of its covariance."""
    height, sd = param("height", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    away = np.minimum(np.arange(len(y)), len(y) - np.arange(len(y)))
    x = numpyro.sample("x", dist.CirculantNormal(jnp.zeros(len(y)), height * jnp.exp(-away / 2.0)))
    with numpyro.plate("rows", len(y)):
        normal("y", x, sd, y)


def moved_and_stretched(y, x, group, count=4):
    """An effect that NumPyro makes of a standard one by a transform."""
    mean, between, sd = param("mean", 0.4), param("between", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    transform = dist.transforms.AffineTransform(mean, between)
    with numpyro.plate("groups", count):
        u = numpyro.sample("u", dist.TransformedDistribution(dist.Normal(0.0, 1.0), transform))
    with numpyro.plate("rows", len(y)):
        normal("y", u[group] + 0.5 * x, sd, y)


def mean_reverting(y):
    """A stochastic differential equation with linear drift, in steps of a given size."""
    pull, sd = param("pull", 0.6, POSITIVE), param("sd", 0.6, POSITIVE)

    def equation(x, _):
        return -pull * x, 0.7 * jnp.ones_like(x)

    x = numpyro.sample("x", dist.EulerMaruyama(jnp.arange(len(y)) * 0.5, equation, dist.Normal(0.0, 1.0)))
    with numpyro.plate("rows", len(y)):
        normal("y", x, sd, y)


def flat(name, *event):
    """A latent of which nothing is known."""
    return numpyro.sample(name, dist.ImproperUniform(constraints.real, (), event))


def restricted(y, x, group, count=4):
    """Fixed effects integrated, as REML does."""
    scatter, sd = param("scatter", SCATTER, COVARIANCE), param("sd", 0.6, POSITIVE)
    beta = flat("beta", 2)
    with numpyro.plate("groups", count):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scatter))
    with numpyro.plate("rows", len(y)):
        normal("y", beta[0] + beta[1] * x + b[group, 0] + b[group, 1] * x, sd, y)


def flat_by_group(y, x, group, count=4):
    slope, sd = param("slope", 0.4), param("sd", 0.6, POSITIVE)
    with numpyro.plate("groups", count):
        u = flat("u")
    with numpyro.plate("rows", len(y)):
        normal("y", u[group] + slope * x, sd, y)


def diffuse_trend(y, start=flat):
    """Level and slope start anywhere, or as `start` has it; the first observations may be missing."""
    move, bend, sd = param("move", 0.8, POSITIVE), param("bend", 0.4, POSITIVE), param("sd", 0.6, POSITIVE)

    def step(carry, seen):
        level, slope = carry
        level, slope = normal("level", level + slope, move), normal("slope", slope, bend)
        normal("y", level, sd, seen)
        return (level, slope), None

    scan(step, (start("level0"), start("slope0")), y)


def diffuse_state(y):
    q, sd = param("q", SCATTER, COVARIANCE), param("sd", 0.6, POSITIVE)
    start = numpyro.sample("start", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    turn = jnp.array([[0.9, 0.3], [-0.3, 0.9]])

    def step(x, seen):
        x = numpyro.sample("x", dist.MultivariateNormal(turn @ x, q))
        normal("y", x[0], sd, seen)
        return x, None

    scan(step, start, y)


def diffuse_series(y):
    move, sd = param("move", 0.8, POSITIVE), param("sd", 0.6, POSITIVE)
    with numpyro.plate("series", y.shape[1]):
        first = flat("first")

    def step(x, seen):
        with numpyro.plate("series", y.shape[1]):
            x = normal("x", x, move)
            normal("y", x, sd, seen)
        return x, None

    scan(step, first, y)


class Exchangeable(dist.Distribution):
    """Entries alike, of a variance and of one covariance between any two: a law that says nothing but its density."""

    arg_constraints = {"spread": constraints.positive, "shared": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, spread, shared, size):
        self.spread, self.shared, self.size = spread, shared, size
        super().__init__((), (size,))

    def log_prob(self, value):
        inner, whole = self.spread**2, self.spread**2 + self.size * self.shared**2
        mean = value.mean(-1)
        squares = ((value - mean[..., None]) ** 2).sum(-1) / inner + self.size * mean**2 / whole
        log_det = (self.size - 1) * jnp.log(inner) + jnp.log(whole)
        return -0.5 * (squares + log_det + self.size * jnp.log(2 * jnp.pi))

    def sample(self, key, sample_shape=()):
        return jax.random.normal(key, (*sample_shape, self.size))


def unseen(y):
    spread, shared, sd = param("spread", 0.8, POSITIVE), param("shared", 0.5, POSITIVE), param("sd", 0.6, POSITIVE)
    x = numpyro.sample("x", Exchangeable(spread, shared, len(y)))
    with numpyro.plate("rows", len(y)):
        normal("y", x, sd, y)
