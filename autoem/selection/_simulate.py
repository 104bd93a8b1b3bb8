"""Data simulated from a fitted model, and the same structure with other data in the place of those observed.

In: a fit. Out: `Resampling`, which draws every observed site as many times as asked, in one program, and gives any
structure with the same observed sites an `EM` that takes such draws as its first argument. What observed sites are
drawn from must not itself read the data that the draws replace: that is looked up in the model's data flow, and
refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers

from autoem._em import EM
from autoem._errors import DataError, ModelError, PlanError
from autoem.answers.result import EMResult
from autoem.checks.check import Call as Derived
from autoem.checks.check import observing, simulate
from autoem.e_step.tables.factors import tied_to_states
from autoem.graph.programs import jit_once
from autoem.ir import Program

READ = ("elem", "mask", "scale", "low", "high")  # fields of a site that its density is made of


def derived(result: EMResult) -> Derived:
    context = result._context
    return Derived(context.built, context.source, context.args, context.kwargs)


def observed_sites(result: EMResult) -> list[str]:
    """Names of the sites that hold data, as NumPyro calls them."""
    return sorted(s.name for s in result._context.built.program.sites.values() if s.role == "observed")


def refuse_approximate(result: EMResult, what: str, comparable: bool = True) -> None:
    """Raise where the fit has no likelihood that can be compared with another's.

    Args:
        what: what is asked for, as a noun.
        comparable: whether an approximation of the log-likelihood will do, if no draw moves it.

    Raises:
        PlanError: what was maximised is a bound, or another function than the likelihood, or wavers with the draws.
    """
    kernel = result._context.built.kernel
    treatment = kernel.treatment
    if treatment is None or (comparable and treatment.comparable):
        return
    problem = f"{what} compare likelihoods, and this fit maximised its {kernel.objective_name}"
    mend = "an exact E-step"
    if kernel.program.continuous:
        mend += ", or e_step=autoem.e_step.Laplace()" * comparable
    raise PlanError(kernel.program.name, problem=problem, mend=f"{mend}: see the plan for what it takes", kind="model")


def refuse_unsimulable(result: EMResult) -> None:
    """Raise where a draw from the fitted model is not a data set like the one fitted.

    Raises:
        PlanError: a site has weights, is a factor, or reads its data in Python; a plate is subsampled; data are not
            what a site draws.
    """
    program, source = result._context.built.program, result._context.source
    if why := tied_to_states(result._context.built.factors):
        mend = "write the choice into the arguments of one site (jnp.where, or an index), which observes the data alone"
        raise PlanError(why[0], problem=why[1], mend=mend)
    for site in program.sites.values():
        if site.role == "factor":
            problem = "a numpyro.factor has no distribution to draw data from"
            raise PlanError(site.name, problem=problem, mend="write it as a sample site, with obs=")
        if site.scaled:
            problem = "its rows have weights, and weighted rows are no sample that could be drawn again"
            raise PlanError(site.name, problem=problem, mend="repeat rows instead: np.repeat(x, counts, axis=0)")
    if program.subsampled:
        mend = "fit without subsample_size"
        raise PlanError(program.name, problem="a plate of it is subsampled", mend=mend, kind="model")
    if source.concrete:
        problem = "the model reads the values of its arguments in Python, so they cannot be replaced by draws"
        raise PlanError(program.name, problem=problem, mend="write the branch with jnp.where", kind="model")


def draws(result: EMResult, rng_key: Array, num: int) -> dict[str, Array]:
    """`num` data sets drawn from the fitted model, by observed site, the data themselves first: `(num + 1, *shape)`.

    Holes of the data are holes of every draw.

    Raises:
        PlanError: the model cannot be simulated; names the site.
    """
    refuse_unsimulable(result)
    call, em = derived(result), result._context.em
    params = dict(result.params)

    def draw(key: Array) -> dict[str, Array]:
        return simulate(em.model, params, key, call)

    try:
        with numpyro.validation_enabled(False):
            drawn = jit_once(jax.vmap(draw))(jax.random.split(rng_key, num))
            seen = jit_once(lambda: given(em, call, params, list(drawn)))()
    except (ModelError, PlanError, DataError):
        raise
    except Exception as error:
        problem = f"NumPyro cannot draw data from it ({type(error).__name__}: {str(error).splitlines()[0]})"
        mend = "every observed site needs a distribution that can be sampled"
        raise PlanError(call.built.program.name, problem=problem, mend=mend, kind="model") from error
    for name, value in drawn.items():
        if value.shape[1:] != seen[name].shape:
            problem = f"a draw of it has shape {value.shape[1:]}, its data {seen[name].shape}"
            raise PlanError(name, problem=problem, mend="give its distribution the shape of the data")
    return {n: jnp.concatenate([seen[n][None].astype(v.dtype), v]) for n, v in drawn.items()}


def given(em: EM, call: Derived, params: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
    """The data of the observed sites."""
    with handlers.trace() as trace, handlers.seed(rng_seed=0), handlers.substitute(data=dict(params)):
        em.model(*call.args, **call.kwargs)
    return {n: jnp.asarray(trace[n]["value"]) for n in names}


def with_draws(result: EMResult, drawn: Mapping[str, Array], restarts: int | None) -> EM:
    """The structure of a fit, as an `EM` whose first argument is a dict of data by observed site.

    Raises:
        PlanError: the structure observes other sites, or a distribution in it reads the data that are replaced.
    """
    em = copy.copy(result._context.em)
    sites = observed_sites(result)
    if sites != sorted(drawn):
        problem = f"it observes {sites}, and the data are drawn for {sorted(drawn)}"
        raise PlanError(result.plan.program.name, problem=problem, mend="name the observed sites alike", kind="model")
    em.model, em.progress, em._builds, em._loops, em._batches = observing(em.model), False, {}, {}, {}
    em.restarts = em.restarts if restarts is None else restarts
    if isinstance(em.init, Mapping):
        em.init = {n: v for n, v in em.init.items() if n in result.params}
    refuse_second_readers(em, result, {n: v[0] for n, v in drawn.items()})
    return em


def refuse_second_readers(em: EM, result: EMResult, data: Mapping[str, Any]) -> None:
    """Raise where the model, given other data at its observed sites, still reads the old ones in a density."""
    context = result._context
    before: Program = context.built.program
    values = [k for k in before.full.outputs if k[1] == "value" and k[0] in before.sites]
    observed = [k for k in values if before.sites[k[0]].role == "observed"]
    replaced = {k[1] for k in before.full.needs(*observed) if k[0] == "data"}
    built, source = em._derive((data, *context.args), context.kwargs)
    shift = len(source.data) - len(context.source.data)
    after = built.program
    for key in after.full.outputs:
        if key[1] in READ or key[1].startswith("arg:"):
            again = {k[1] - shift for k in after.full.needs(key) if k[0] == "data"} & replaced
            if again:
                name = context.source.argument(min(again))
                problem = f"it reads '{name}', which is data of an observed site: a draw cannot replace it there"
                raise PlanError(
                    key[0], problem=problem, mend="pass what is given and what is observed as two arguments"
                )
