"""Decide what each unobserved continuous site is: a parameter with a prior, or a latent; and who depends on whom.

In: a Program whose continuous sites are undecided. Out: the same with every such site a parameter, its reason recorded,
or a refusal. The rule: a site is a parameter when its prior depends on no other parameter and it stands in no plate
with observed data below it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

import jax
import numpy as np

from autoem._errors import ModelError, PlanError
from autoem.families import Family
from autoem.ir import Param, Program, Site, at_step

MAXIMISED = "maximised because maximize= names it"
PRIOR = "a parameter with a prior: its prior reads no other parameter, and no data stand in its plates"
JOINT = (
    "a parameter that was named to be maximised; its prior reads latents, so its density counts in the log-likelihood"
)

DECENTERED = "_decentered"  # how NumPyro's LocScaleReparam names an effect without its location and scale


def classify(program: Program, constraints: dict, latent: tuple[str, ...], maximize: tuple[str, ...]) -> Program:
    """Give every continuous unobserved site its role.

    Args:
        constraints: support of each such site.
        latent: names that the user wants integrated.
        maximize: names that the user wants maximised whatever the rule says.

    Raises:
        PlanError: `latent` or `maximize` names no such site.
    """
    refuse_unknown(program, latent, maximize)
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(float))
    params = {
        n: dataclasses.replace(p, dtype=dtype, reason="declared with numpyro.param") for n, p in program.params.items()
    }
    sites = {n: dataclasses.replace(s, parents=parents_of(program, s)) for n, s in program.sites.items()}
    program = dataclasses.replace(program, sites=sites)
    for site in list(sites.values()):
        if site.role != "parameter":
            continue
        reason = MAXIMISED if site.name in maximize else PRIOR
        if any(k[0] == "latent" for k in program.full.needs((site.name, "elem"))):
            reason = JOINT
        sites[site.name] = dataclasses.replace(site, reason=reason)
        shape = program.full.inputs["param", site.name].shape
        params[site.name] = Param(site.name, shape, dtype, constraints[site.name], site.name, reason)
    return dataclasses.replace(program, sites=sites, params=params)


def refuse_unknown(program: Program, latent: tuple[str, ...], maximize: tuple[str, ...]) -> None:
    for option, names in (("latent", latent), ("maximize", maximize)):
        for name in names:
            if (name in program.latents or name in program.continuous) and option == "latent":
                continue
            site = program.sites.get(name)
            if site is None or site.role not in ("parameter",):
                known = [
                    s.name
                    for s in program.sites.values()
                    if s.role == "parameter" or (s.role == "latent" and option == "latent")
                ]
                raise PlanError(
                    name,
                    problem=f"{option}= names it, but it {what_it_is(program, name)} of the model",
                    mend=nearest(name, known),
                )


def what_it_is(program: Program, name: str) -> str:
    if name in program.params:
        return "is already a parameter (numpyro.param)"
    site = program.sites.get(name)
    if site is None:
        return "is no unobserved site"
    role = {"latent": "a discrete latent"}.get(site.role, site.role)
    return f"is {role}, not an unobserved continuous site"


def nearest(name: str, names: Iterable[str]) -> str:
    """What to write instead of a name that does not exist."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    among = f"choose among {known}" if known else "leave it out: the model has none to name"
    return f"did you mean '{close[0]}'? ({among})" if close else among


def parents_of(program: Program, site: Site) -> tuple[str, ...]:
    """Names of the parameters and latents that the site's density reads, itself excepted."""
    graph = program.graph if program.chains else program.full  # the pieces of a path are told apart in the former
    fields = [k for k in graph.outputs if k[0] == site.name]
    needs = graph.needs(*fields)
    names = [k[1] for k in needs if k[0] in ("param", "latent") and k[1] != site.name]
    order = [k[1] for k in graph.inputs if k[0] in ("param", "latent")]
    return tuple(sorted(names, key=order.index))


def continuous_latents(program: Program, latent: tuple[str, ...], maximize: tuple[str, ...]) -> dict[str, str]:
    """The unobserved continuous sites that are latents, each with the reason."""
    refuse_unknown(program, latent, maximize)
    sites = {n: dataclasses.replace(s, parents=parents_of(program, s)) for n, s in program.sites.items()}
    program = dataclasses.replace(program, sites=sites)
    out = {}
    for site in sites.values():
        if site.role != "parameter" or site.name in maximize:
            continue
        if why := "latent= names it" if site.name in latent else why_latent(program, site):
            out[site.name] = why
            refuse_forgotten(program, site, why)
    return out


def refuse_forgotten(program: Program, site: Site, why: str) -> None:
    """Raise where nothing depends on a latent while an argument reaches no site: it is that argument's, unobserved."""
    hints = [n for n in program.notes if n.endswith("forgotten?")]
    if hints and not any(site.name in s.parents for s in program.sites.values()):
        raise ModelError(
            site.name,
            problem=f"a continuous latent ({why}) that nothing depends on; {'; '.join(hints)}",
            mend=f'numpyro.sample("{site.name}", ..., obs=...) if it is observed, or leave the site out',
        )


def why_latent(program: Program, site: Site) -> str:
    """Why the site is a latent, or an empty string where it is a parameter."""
    others = [p for p in site.parents if p in program.sites or p in program.params]
    if others:
        return f"its prior depends on {', '.join(others)}"
    below = [s for s in program.sites.values() if site.name in s.parents and s.role != "parameter"]
    for child in below:
        if child.role == "continuous" and child.name == at_step(program.base_of(child.name), 0) != site.name:
            return f"the chain of '{program.base_of(child.name)}' starts from it"
    for child in below:
        if shared := set(site.plates) & set(child.plates):
            return f"it stands in plate '{min(shared)}' with '{child.name}', which depends on it"
    beside = any(p in program.every_latent for s in below for p in s.parents)
    if site.plates and standard_normal(program, site) and (site.name.endswith(DECENTERED) or not beside):
        return "a standard normal effect for each group of rows (non-centred)"
    return ""


def standard_normal(program: Program, site: Site) -> bool:
    """Whether the site is Normal(0, 1) by literal constants."""
    keys = [(site.name, "arg:loc"), (site.name, "arg:scale")]
    if site.distribution != "Normal" or not isinstance(site.family, Family) or program.full.needs(*keys):
        return False
    loc, scale = program.full.evaluate(keys, {})
    return bool(np.all(np.asarray(loc) == 0) and np.all(np.asarray(scale) == 1))
