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


def superposition(asked: Asked) -> AbstractBlock:
    """The parameter as a term of rates, of Poisson counts and of negative binomial ones.

    Raises:
        Declined: it is none.
    """
    return superposition_rule(asked, mixed=True)


def as_asked(asked: Asked, wish: Augmented | OrderedSubsets) -> AbstractBlock | tuple[Place, ...]:
    """What was asked for.

    Raises:
        PlanError: it does not serve the parameter.
    """
    name = asked.name
    try:
        if isinstance(wish, OrderedSubsets):
            block = superposition(asked)
            assert isinstance(block, Superposition)
            return subsets_of(block, wish.num_subsets)
        return superposition(asked) if asked.kind == "positive" else places(asked)
    except Declined as reason:
        mend = f'leave "{name}" out of m_step=, or m_step={{"{name}": autoem.m_step.Newton()}}'
        problem = f"no augmentation serves it: {reason}"
        if isinstance(wish, OrderedSubsets):
            problem = f"ordered subsets do not serve it: {reason}"
            mend = f'leave "{name}" out of m_step=' + (
                "; or write the rate row by row, as system @ activity or (weight * activity[index]).sum(1)"
                if "rows" in str(reason)
                else ""
            )
        raise PlanError(name, problem=problem, mend=mend) from None


def offer(asked: Asked) -> str:
    """That an augmentation would serve a parameter that is maximised otherwise, for the plan; or an empty string."""
    try:
        if asked.kind == "positive":
            would, source = "split its counts", superposition(asked).source
        else:
            served = [p.law for p in places(asked) if p.law is not QUADRATIC]
            would, source = "make it least squares", "; ".join(dict.fromkeys(law.source for law in served))
    except Declined:
        return ""
    return f'm_step={{"{asked.name}": Augmented()}} would {would}: {source}'
