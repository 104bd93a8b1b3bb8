"""Conjugate priors as pseudo-statistics.

In: the prior's factor. Out: what it adds to the expected counts (Dirichlet, Beta), to the two coefficients of a power
update (Gamma, InverseGamma, ...), to a scatter matrix (Wishart, InverseWishart) or to gradient and curvature (Normal),
so that maximum a posteriori keeps the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from autoem.e_step.tables.tabulate import Factor
from autoem.ir import Program
from autoem.m_step.problem import Bundle, graph_values

Terms = tuple[Array, Array]
Arguments = Mapping[str, Array]

# class name -> (attributes, pseudo-counts of log p and of log(1 - p))
COUNTS: dict[str, tuple[tuple[str, ...], Callable[[Arguments], Terms]]] = {
    "Dirichlet": (("concentration",), lambda a: (a["concentration"] - 1, jnp.zeros(()))),
    "Beta": (("concentration1", "concentration0"), lambda a: (a["concentration1"] - 1, a["concentration0"] - 1)),
    "Uniform": ((), lambda a: (jnp.zeros(()), jnp.zeros(()))),
}

# class name -> (attributes, degree m, (a, b) of the log density a log s - b s^m)
POWERS: dict[str, tuple[tuple[str, ...], float | None, Callable[[Arguments], Terms]]] = {
    "Gamma": (("concentration", "rate"), 1.0, lambda a: (a["concentration"] - 1, a["rate"])),
    "Exponential": (("rate",), 1.0, lambda a: (jnp.zeros(()), a["rate"])),
    "InverseGamma": (("concentration", "rate"), -1.0, lambda a: (-a["concentration"] - 1, a["rate"])),
    "HalfNormal": (("scale",), 2.0, lambda a: (jnp.zeros(()), 0.5 / a["scale"] ** 2)),
    "Pareto": (("alpha",), None, lambda a: (-a["alpha"] - 1, jnp.zeros(()))),
    "Uniform": ((), None, lambda a: (jnp.zeros(()), jnp.zeros(()))),
}

# class name -> the form of the matrix that it is conjugate to
MATRICES = {"Wishart": "precision", "InverseWishart": "covariance"}

NORMAL = ("loc", "scale")
# class name -> attributes, where the log density is quadratic on its support
QUADRATIC = {"Normal": NORMAL, "HalfNormal": ("scale",)}
FLAT = "ImproperUniform"
SOURCE = "Gelman et al. 2013, Bayesian Data Analysis, chapter 2"


def arguments_of(factor: Factor, names: tuple[str, ...], values: Mapping) -> dict[str, Array]:
    """Arguments of the prior's distribution, from the model's graph."""
    keys = [(factor.name, f"arg:{a}") for a in names]
    return dict(zip(names, factor.graph.evaluate(keys, values), strict=True))


def readable(factor: Factor, names: tuple[str, ...]) -> bool:
    """Whether the graph holds these arguments and no parameter enters them."""
    keys = [(factor.name, f"arg:{a}") for a in names]
    held = all(k in factor.graph.outputs for k in keys)
    return held and not any(k[0] in ("param", "latent") for k in factor.graph.needs(*keys)) and not factor.site.scaled


def prior_of(param: str, factors: Mapping[str, Factor]) -> Factor | None:
    """The prior of a parameter; None where it has none, or one that is flat wherever the parameter may be."""
    factor = factors.get(param)
    return factor if factor is not None and factor.is_prior and factor.site.distribution != FLAT else None


def prior_slope(prior: Factor, value: Array, params: Mapping[str, Array], bundle: Bundle) -> Array:
    """Gradient of a prior's log density in its parameter, at `value`."""
    rows = bundle.rows[prior.name]

    def density(v: Array) -> Array:
        return prior.table(prior.cells(graph_values(bundle, {**params, prior.name: v}), rows), rows).value.array.sum()

    return jax.grad(density)(value)


def describe(program: Program, param: str) -> str:
    prior = program.params[param].prior
    return f" with the prior {program.sites[prior].distribution} as pseudo-statistics" if prior else ""
