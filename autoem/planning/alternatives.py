"""What else could treat a latent or a parameter: every strategy that the model admits, tried out and not guessed.

In: a plan, and the means to derive it anew with other options. Out: `Alternatives`, rows that print as a table; each
holds the options that ask for it.
"""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from autoem._errors import DataError, ModelError, PlanError
from autoem.e_step.registry import CONTINUOUS, DISCRETE, STRATEGIES, Strategy
from autoem.ir import Program
from autoem.m_step import strategies as m_steps
from autoem.m_step.strategies import AbstractMStep
from autoem.passes.classify import nearest
from autoem.planning.render import _table

if TYPE_CHECKING:
    from autoem.planning.plan import Plan

WIDTH = 110
M_STEPS: tuple[tuple[AbstractMStep, str], ...] = (
    (m_steps.ClosedForm(), "the maximum of Q at once, or of a bound that touches it"),
    (m_steps.Augmented(), "the maximum of a bound of Q at once, by a latent that is not in the text: more EM steps"),
    (m_steps.OrderedSubsets(), "several updates for the price of one, far from the maximum; near it plain EM"),
    (m_steps.Newton(), "the maximum of Q by iterations"),
    (m_steps.Gradient(), "raises Q by steps along its gradient and does not maximise it: more EM steps"),
    (m_steps.Fixed(), "stays at its start value: nothing is estimated"),
)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another strategy that the model admits.

    Attributes:
        name: the latent or parameter.
        strategy: the strategy, as it is written.
        changes: what becomes of the objective and the answer.
        price: what a step costs.
        source: where it is derived.
        options: what to give `EM` to have it, as `EM(model, **options)`; the options that were given are among them.
    """

    name: str
    strategy: str
    changes: str
    price: str
    options: Mapping[str, Any]
    source: str = ""


class Alternatives(tuple[Alternative, ...]):
    """Alternatives that print as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no other strategy can do it"
        lines = []
        for a in self:
            told = [f"price: {a.price}"] * bool(a.price) + [a.source] * bool(a.source)
            text = f"{a.changes} ({'; '.join(told)})" if told else a.changes
            lines += [f"{a.name}  {a.strategy}"]
            lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [(a.name, *(html.escape(t) for t in (a.strategy, a.changes, a.price, a.source))) for a in self]
        return _table(("name", "strategy", "what it changes", "price", "source"), rows)


def alternatives(plan: Plan, name: str | None = None) -> Alternatives:
    """Everything else that could treat `name`, or each latent and each parameter."""
    program = plan.program
    latents, params = [r.name for r in plan.latents], [r.name for r in plan.parameters]
    if name is not None and name not in [*latents, *params]:
        raise KeyError(f"the model has no {name!r}: {nearest(name, [*latents, *params])}")
    out: list[Alternative] = []
    for latent in latents if name is None else [n for n in latents if n == name]:
        kind = DISCRETE if latent in program.latents else CONTINUOUS
        for row in STRATEGIES:
            if row.offered and kind in row.latents:
                out += other_e_step(plan, latent, row)
    for param in params if name is None else [n for n in params if n == name]:
        out += other_m_steps(plan, param)
    return Alternatives(out)


def by_name(wish: Any, names: Iterable[str]) -> dict[str, Any]:
    """What was asked for, by name; what was asked for all, for each of `names`."""
    return dict(wish) if isinstance(wish, Mapping) else dict.fromkeys(names if wish is not None else (), wish)


def latents_of(program: Program, wish: Any) -> list[str]:
    """The latents that a strategy for all is for."""
    row = next((r for r in STRATEGIES if isinstance(wish, type(r.example))), None)
    kinds = row.latents if row else ()
    return [*(program.latents if DISCRETE in kinds else ()), *(program.continuous if CONTINUOUS in kinds else ())]


def other_e_step(plan: Plan, latent: str, row: Strategy) -> Iterator[Alternative]:
    """The alternative, if the model can be derived with it and is treated otherwise then."""
    program = plan.program
    kind, wish = program.latents if latent in program.latents else program.continuous, plan.asked.get("e_step")
    for names in (list(kind),) if row.together else ([latent], list(kind)):  # alone, or else all of its kind
        options = {"e_step": {**by_name(wish, latents_of(program, wish)), **dict.fromkeys(names, row.example)}}
        if (found := derived(plan, options)) is not None:
            break
    else:
        return
    if found.e_step(latent) != plan.e_step(latent):
        where = f", with {', '.join(n for n in names if n != latent)}" if len(names) > 1 else ""
        price = f"{row.price}: {found.cost}" if found.cost.entries else row.price
        how = f"autoem.e_step.{row.example}{where}"
        yield Alternative(latent, how, row.changes, price, {**plan.asked, **options}, row.source)


def other_m_steps(plan: Plan, param: str) -> Iterator[Alternative]:
    """The other ways to maximise over a parameter."""
    for strategy, changes in M_STEPS:
        options = {"m_step": {**by_name(plan.asked.get("m_step"), plan.program.params), param: strategy}}
        found = derived(plan, options)
        if found is not None and told(found, param) != told(plan, param):
            source = told(found, param)[1]
            yield Alternative(param, f"autoem.m_step.{strategy}", changes, "", {**plan.asked, **options}, source)


def told(plan: Plan, param: str) -> tuple[str, str]:
    """What tells two ways to maximise over a parameter apart: the kind, and where it is derived."""
    return next((r.strategy, r.source) for r in plan.parameters if r.name == param)


def derived(plan: Plan, options: Mapping[str, Any]) -> Plan | None:
    """The plan with other options; None where they do not go with the model."""
    try:
        return plan.derive(**options) if plan.derive else None
    except (ModelError, PlanError, DataError):
        return None
