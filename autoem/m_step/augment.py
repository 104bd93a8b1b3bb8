"""Which augmentation serves a parameter: where one was asked for, and where one could be.

In: a parameter with its places. Out: the places that an augmentation makes locations, or a superposition; or
`Declined`. Of a parameter that is left to Newton's method or to gradients also a clause for the plan, that one would
serve.
"""

from __future__ import annotations

from autoem._errors import PlanError
from autoem.m_step.block import AbstractBlock
from autoem.m_step.closed_form.laws import QUADRATIC
from autoem.m_step.closed_form.location import accept_linear
from autoem.m_step.closed_form.places import Place, place_of
from autoem.m_step.closed_form.priors import NORMAL, prior_of, readable
from autoem.m_step.closed_form.rules import Asked, superposition_rule
from autoem.m_step.closed_form.subsets import subsets_of
from autoem.m_step.closed_form.superposition import Superposition
from autoem.m_step.problem import Use
from autoem.m_step.strategies import Augmented, OrderedSubsets
from autoem.passes.link import Declined


def places(asked: Asked) -> tuple[Place, ...]:
    """Every place of a parameter: a location once a latent is there, or one already.

    Raises:
        Declined: one is neither, or all are what they are without any latent.
    """
    if asked.kind != "real" or not asked.uses:
        raise Declined("it is constrained, so least squares may leave its domain")
    prior = prior_of(asked.name, asked.problem.factors)
    if prior and (prior.site.distribution != "Normal" or not readable(prior, NORMAL)):
        raise Declined(f"its prior {prior.site.distribution} is not Normal")
    found = tuple(place_at(asked, use) for use in asked.uses)
    if all(p.law is QUADRATIC for p in found):
        raise Declined("its objective is quadratic without one")
    return found


def place_at(asked: Asked, use: Use) -> Place:
    """The place `use`."""
    place = place_of(use.factor, asked.name)
    if place.law is QUADRATIC:
        asked.read(lambda p, b: accept_linear(asked.problem, use, (asked.name,), p, b))
    return place


def augmented(asked: Asked) -> Superposition | tuple[Place, ...]:
    """The augmentation that serves a parameter: its places; or its rates, of Poisson counts or negative binomial ones.

    Raises:
        Declined: none does.
    """
    if asked.kind != "positive":
        return places(asked)
    try:
        return superposition_rule(asked, mixed=True)
    except Declined as reason:
        raise Declined(f"it is constrained, so least squares may leave its domain, and {reason}") from None


def as_asked(asked: Asked, wish: Augmented | OrderedSubsets) -> AbstractBlock | tuple[Place, ...]:
    """What was asked for.

    Raises:
        PlanError: it does not serve the parameter.
    """
    name, what = asked.name, "ordered subsets do" if isinstance(wish, OrderedSubsets) else "an augmentation does"
    mend = f'leave "{name}" out of m_step=, or m_step={{"{name}": autoem.m_step.Newton()}}'
    try:
        if isinstance(wish, Augmented):
            return augmented(asked)
        whole = superposition_rule(asked, mixed=True)
        mend = f'm_step={{"{name}": autoem.m_step.ClosedForm()}}, or write the rate row by row, as system @ {name} or '
        mend += f"(weight * {name}[index]).sum(1)"
        return subsets_of(whole, wish.num_subsets)
    except Declined as reason:
        raise PlanError(name, problem=f"{what} not serve it: {reason}", mend=mend) from None


def offer(asked: Asked) -> str:
    """That an augmentation would serve a parameter that is maximised otherwise, for the plan; or an empty string."""
    try:
        found = augmented(asked)
    except Declined:
        return ""
    if isinstance(found, Superposition):
        would, sources = "split its counts", [found.source]
    else:
        would, sources = "make it least squares", [p.law.source for p in found if p.law is not QUADRATIC]
    return f'm_step={{"{asked.name}": Augmented()}} would {would}: {"; ".join(dict.fromkeys(sources))}'
