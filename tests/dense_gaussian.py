"""The truth about a model with Gaussian latents: one dense Gaussian over all that is unseen, by NumPyro's log density.

In: a model, parameters, and data in which NaN marks what is missing. The log joint is a quadratic in the continuous
latents and the missing values together, so its gradient and Hessian at zero hold all of it; discrete latents beside
them are enumerated. No code is shared with autoem, and nothing is known here of rows, cells or time.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import log_density

Params = dict[str, Any]


class Moments(NamedTuple):
    """Log-likelihood; mean by latent; covariance of all coordinates, with the position of each latent's among them."""

    log_likelihood: float
    mean: dict[str, np.ndarray]
    covariance: np.ndarray
    places: dict[str, np.ndarray]

    def of_cells(self, name: str, event: int) -> np.ndarray:
        """The covariance within each cell of a latent, `(cells, d, d)`, where a cell has `event` coordinates."""
        where = self.places[name].reshape(-1, event)
        return self.covariance[where[:, :, None], where[:, None, :]]


class Dense:
    """Integrates `model` at given parameters. `reverse` names latents that NumPyro takes in the order of the steps."""

    def __init__(self, model: Callable, args: tuple, reverse: Sequence[str] = ()):
        self.model, self.reverse = model, reverse
        self.args = tuple(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args)
        seeded = handlers.trace(handlers.substitute(handlers.seed(model, jax.random.key(0)), substitute_fn=of_flat))
        with np.errstate(invalid="ignore"):
            sites = seeded.get_trace(*self.filled(jnp.zeros(self.num_missing))).values()
        hidden = [s for s in sites if s["type"] == "sample" and not s["is_observed"]]
        self.shapes = {s["name"]: np.shape(s["value"]) for s in hidden if not s["fn"].is_discrete}
        self.states = {s["name"]: (np.shape(s["value"]), _states(s)) for s in hidden if s["fn"].is_discrete}

    @property
    def num_missing(self) -> int:
        return sum(int(np.isnan(a).sum()) for a in self.args if isinstance(a, jax.Array))

    def filled(self, values: Any) -> tuple:
        """The arguments, with what is missing set to `values`."""
        out, start = [], 0
        for a in self.args:
            holes = np.flatnonzero(np.isnan(a)) if isinstance(a, jax.Array) else ()
            if len(holes):
                a = a.ravel().at[holes].set(values[start : start + len(holes)]).reshape(a.shape)
            out.append(a)
            start += len(holes)
        return tuple(out)

    @functools.cached_property
    def completions(self) -> dict[str, np.ndarray]:
        """Every completion of the discrete latents, along the first axis."""
        cells = [(n, size) for n, (shape, size) in self.states.items() for _ in range(int(np.prod(shape, dtype=int)))]
        table = np.array(list(itertools.product(*(range(size) for _, size in cells))), int)
        names = np.array([n for n, _ in cells])
        return {n: table[:, names == n].reshape(-1, *shape) for n, (shape, _) in self.states.items()}

    def log_joint(self, params: Params, latents: dict, missing: Any, chosen: dict) -> jax.Array:
        values = {n: v[::-1] if n in self.reverse else v for n, v in latents.items()}
        seeded = handlers.seed(self.model, jax.random.key(0))
        return log_density(seeded, self.filled(missing), {}, params | values | chosen)[0]

    @functools.cached_property
    def zeros(self) -> tuple[jax.Array, Callable]:
        return ravel_pytree(({n: jnp.zeros(s) for n, s in self.shapes.items()}, jnp.zeros(self.num_missing)))

    @functools.cached_property
    def _integrate(self) -> Callable:
        zero, unravel = self.zeros

        def one(params: Params, chosen: dict):
            def density(v):
                latents, missing = unravel(v)
                return self.log_joint(params, latents, missing, chosen)

            # the gradient of a quadratic is affine: its slopes are differences, and compile sooner than a Hessian
            gradients = jax.vmap(jax.grad(density))(jnp.concatenate([zero[None], jnp.eye(len(zero))]))
            slope, precision = gradients[0], gradients[0] - gradients[1:]
            covariance = jnp.linalg.inv(0.5 * (precision + precision.T))
            fit = 0.5 * slope @ covariance @ slope - 0.5 * jnp.linalg.slogdet(precision / (2 * jnp.pi))[1]
            return density(zero) + fit, covariance @ slope, covariance

        return jax.jit(jax.vmap(one, (None, 0), axis_size=len(next(iter(self.completions.values()), [0]))))

    def log_likelihood(self, params: Params) -> jax.Array:
        """As a function of the parameters, to be differentiated."""
        return jax.nn.logsumexp(self._integrate(params, self.completions)[0])

    def moments(self, params: Params) -> Moments:
        each, means, covariances = (np.asarray(x) for x in self._integrate(params, self.completions))
        log_z = np.logaddexp.reduce(each)
        weight = np.exp(each - log_z)
        mean = weight @ means
        spread = means - mean
        covariance = np.einsum("c,cij->ij", weight, covariances) + np.einsum("c,ci,cj->ij", weight, spread, spread)
        unravel, positions = self.zeros[1], jnp.arange(len(mean)) * 1.0
        places = {n: np.asarray(v, int).ravel() for n, v in unravel(positions)[0].items()}
        return Moments(float(log_z), {n: np.asarray(v) for n, v in unravel(mean)[0].items()}, covariance, places)

    def expected_log_joint(self, params: Params, at: Params) -> jax.Array:
        """`Q(params | at)`: the log joint, expected under the posterior at the parameters `at`."""
        each, means, covariances = self._integrate(at, self.completions)
        unravel = self.zeros[1]

        def one(mean, covariance, chosen):
            # a quadratic's expectation, from two points on each principal axis
            roots = jnp.sqrt(len(mean)) * jnp.linalg.cholesky(covariance).T
            points = jnp.concatenate([mean + roots, mean - roots])
            return jax.vmap(lambda v: self.log_joint(params, *unravel(v), chosen))(points).mean()

        return jax.nn.softmax(each) @ jax.vmap(one)(means, covariances, self.completions)


def of_flat(site: dict) -> Any:
    """A value of a site that NumPyro cannot draw, having no law; None of any other."""
    law = site.get("fn")
    while isinstance(law, dist.ExpandedDistribution | dist.Independent):
        law = law.base_dist
    return jnp.zeros(site["fn"].shape()) if isinstance(law, dist.ImproperUniform) else None


def _states(site: dict) -> int:
    return len(site["fn"].enumerate_support(expand=False).ravel())
