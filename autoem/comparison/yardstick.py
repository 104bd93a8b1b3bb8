"""One derivation by which the end points of all strategies are measured, an exact one if there is any.

In: the comparison's EMs. Out: `Yardstick`, with the log-likelihood, the held-out score and the posterior at any
parameters, and the starts that all have in common.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from autoem._em import EM
from autoem._errors import DataError, ModelError, PlanError
from autoem.answers.drawn import DrawnPosterior
from autoem.answers.posterior import Posterior
from autoem.baselines._target import Target, has_priors, objective_name
from autoem.comparison.row import Latents
from autoem.comparison.strategies import options_of
from autoem.fitting.starts import starts
from autoem.planning.build import Build
from autoem.treatments import AbstractDrawn


@dataclasses.dataclass(frozen=True, eq=False)
class Yardstick:
    """The measure of all end points."""

    target: Target
    args: tuple
    kwargs: dict[str, Any]
    held_out: tuple[tuple, dict[str, Any]] | None

    @property
    def exact(self) -> bool:
        return rank(self.target.built) == EXACT

    @property
    def name(self) -> str:
        """What it measures, without priors."""
        return objective_name(self.target.built).removesuffix(" + log prior")

    @property
    def has_priors(self) -> bool:
        return has_priors(self.target.built)

    @functools.cached_property
    def _objective(self):
        built, kernel = self.target.built, self.target.kernel
        if kernel.treatment is None:
            return jax.jit(lambda params, bundle: kernel.objective(params, bundle))
        state = built.e_state(dict(self.target.starts[0]), self.target.bundle, jax.random.key(0), 0)

        def at(params, bundle):
            found = built.kernel.expect(params, bundle, state)
            return found.likelihood + found.prior, (found.likelihood, found.prior)

        return jax.jit(at)

    def fits(self, params: Mapping[str, Any]) -> bool:
        """Whether these are the parameters of this derivation."""
        own = self.target.built.program.params
        return own.keys() == params.keys() and all(own[n].shape == np.shape(v) for n, v in params.items())

    def measure(self, params: Mapping[str, Any]) -> tuple[float, float]:
        """Log-likelihood, and log-likelihood plus log prior; NaN where no plan has them without random error."""
        if rank(self.target.built) == NOISY:
            return float("nan"), float("nan")
        joint, (likelihood, _) = self._objective(dict(params), self.target.bundle)
        return float(likelihood), float(joint)

    def score(self, params: Mapping[str, Any]) -> float:
        """Log density of the held-out data."""
        if self.held_out is None:
            return float("nan")
        return self._at(params, *self.held_out).total

    def latents(self, params: Mapping[str, Any]) -> Latents:
        """The posterior at these parameters."""
        return latents_of(self._at(params, self.args, self.kwargs), self.target.built)

    def _at(self, params: Mapping[str, Any], args: tuple, kwargs: dict) -> Posterior:
        built, source = self.target.em._derive(args, kwargs)
        if any(p.shape != np.shape(params[n]) for n, p in built.program.params.items()):
            raise DataError(
                "held_out", problem="these data give the parameters other shapes",
                mend="pass the data with the columns, and the model the options, of the fit", kind="argument",
            )  # fmt: skip
        if isinstance(built.kernel.treatment, AbstractDrawn):
            return DrawnPosterior(built, dict(params), built.bundle(source, jax.random.key(0)), source)
        return Posterior(built, dict(params), built.plain_bundle(source, jax.random.key(0)), source)


def latents_of(posterior: Posterior, built: Build) -> Latents:
    """What a posterior says of each latent of the program."""
    program = built.program
    marginals = {n: np.asarray(posterior.marginals[n]) for n in program.latents}
    moments = {n: (np.asarray(posterior.mean[n]), np.asarray(posterior.sd[n])) for n in program.continuous}
    return Latents(marginals, moments)


EXACT, BY_RULE, AT_ONCE, NOISY = range(4)  # how good a measure a derivation is


def rank(built: Build) -> int:
    """How good a measure a derivation is, the best first."""
    if built.kernel.treatment is not None:
        return NOISY if built.kernel.noisy else AT_ONCE
    return BY_RULE if built.kernel.approximate or built.source.truncated else EXACT


def alike(em: EM, base: EM) -> bool:
    """Whether an EM takes the same sites for parameters, and the same data for missing, as the base."""
    return all(getattr(em.options, n) == getattr(base.options, n) for n in ("latent", "maximize", "missing"))


def find(base: EM, ems: Sequence[EM], count: int, rng_key: Array, args: tuple, kwargs: dict, held_out) -> Yardstick:
    """The first exact derivation: the base's, the plain one, then those of the strategies; else the nearest to one.

    Raises:
        ModelError, PlanError, DataError: none of them can be derived; the base's own error.
    """
    plain = [EM(base.model, **{**options_of(base), "e_step": None})] if base.options.e_step is not None else []
    found: list[tuple[EM, Build]] = []
    error: Exception | None = None
    for em in (base, *plain, *ems):
        if found and not alike(em, base):
            continue  # it may be exact, of other parameters
        try:
            found.append((em, em._derive(args, kwargs)[0]))
        except (ModelError, PlanError, DataError) as refused:
            error = error or refused
            continue
        if rank(found[-1][1]) == EXACT:
            break
    if not found:
        assert error is not None
        raise error
    em, built = min(found, key=lambda pair: rank(pair[1]))
    source = em._derive(args, kwargs)[1]
    bundle = built.bundle(source, rng_key)
    begin, _ = starts(built, source, bundle, base.init, count, rng_key)
    bundle = built.plain_bundle(source, rng_key) if built.kernel.treatment is None else bundle
    return Yardstick(Target(em, built, source, bundle, tuple(begin)), args, kwargs, held_out)
