"""Parameters that no M-step can maximise as they stand: refused with what to write instead.

In: a parameter with its places. Out: nothing, or `ModelError`.
"""

from __future__ import annotations

import jax.numpy as jnp

from autoem._errors import ModelError
from autoem.families import Counting, Covariance, Family, Opaque, Power
from autoem.m_step.closed_form.rules import Asked
from autoem.m_step.problem import Use
from autoem.passes.link import Declined, Linear


def refuse_unconstrained(asked: Asked) -> None:
    """Raise where a parameter that may take any value stands, unchanged, where only some values have a meaning."""
    for use in asked.uses if asked.kind == "real" else ():
        rule = use.factor._family.rules[use.argument] if use.argument else None
        if not isinstance(rule, Counting | Power | Covariance) or (isinstance(rule, Counting) and rule.logits):
            continue

        def form(p, b, use=use):
            return asked.problem.link(
                use, lambda: {("param", asked.name): Linear(jnp.asarray(p[asked.name]))}, p, b
            ).form

        try:
            copied = asked.read(form)
        except Declined:
            continue
        if isinstance(copied, Linear) and copied.pure:
            needed = needed_constraint(rule, use)
            raise ModelError(
                asked.name,
                problem=f"it is unconstrained, but it is the {use.argument} of '{use.factor.name}', which is not",
                mend=f'numpyro.param("{asked.name}", ..., constraint=constraints.{needed})',
            )


def refuse_bounds(asked: Asked) -> None:
    """Raise where a parameter moves the support of a site: its likelihood is greatest where a datum is on the edge."""
    for use in asked.uses:
        if not moves_support(use, asked.name):
            continue
        raise ModelError(
            use.factor.name,
            problem=f"the support of {use.factor.site.distribution} depends on the parameter '{asked.name}': its "
            "likelihood is greatest where the support ends at the extreme datum, to which no slope leads",
            mend="pass the bound as data (the extreme datum is its maximum likelihood estimate), "
            "or write a distribution of fixed support, as a scaled Beta",
        )


def moves_support(use: Use, name: str) -> bool:
    """Whether the parameter stands in an argument that bounds the support of the place's site."""
    factor, entry = use.factor, use.factor.site.family
    if isinstance(entry, Opaque) and entry.bounded:
        return True
    bounds = [f"arg:{a}" for a in entry.bounds] if isinstance(entry, Family) else []
    keys = [(factor.name, b) for b in (*bounds, "lower_bound", "upper_bound")]
    return any(("param", name) in factor.graph.needs(k) for k in keys if k in factor.graph.outputs)


def needed_constraint(rule: Counting | Power | Covariance, use: Use) -> str:
    """Name of the constraint that an argument's rule is for."""
    if isinstance(rule, Power):
        return "positive"
    if isinstance(rule, Covariance):
        return "lower_cholesky" if rule.form == "tril" else "positive_definite"
    return "simplex" if use.event_dim else "unit_interval"
