"""The record that teaches autoem one exponential family, and the registry that holds them.

A family states its log density once, in natural form,

    log p(x | a) = eta(a) . T(x) - A(a) + h(x),

and both steps of EM read it: the E-step's log densities are `eta(a)` times `T(x)`, the M-step maximises
`eta(a) . t - A(a) n` where `t` is the posterior expectation of the summed statistics and `n` that of the count.
A `rule` for each argument says how that maximum is found. The laws in tests/laws run over the whole registry.

Shapes: an *event* is one draw (a scalar, or a vector for `MultivariateNormal`), a *batch* is everything around it.
Values arrive with their event axes FIRST, `(*event, *batch)`, and features leave as `(p, *batch)`: the data axis stays
last, which is what matrix products want. Arguments arrive with their event axes LAST, `(*batch, *event)`, as the
distribution holds them; `natural` returns `eta` as `(*batch, p)` and `A` as `(*batch,)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

Args = Mapping[str, Any]


class Rule:
    """How the M-step solves for one argument of a family, given its expected statistics and its other arguments."""


@dataclasses.dataclass(frozen=True)
class Counting(Rule):
    r"""The argument is a probability `p` and the objective is :math:`\sum a \log p + b \log(1 - p)`.

    `counts(t, n)` returns `(a, b)`, shaped like the argument; `b` is `None` where `p` is a point of the simplex.
    With `logits=True` the argument holds log-odds (`b` given) or unnormalised log-probabilities (`b` None) of such a
    `p`.
    """

    counts: Callable[[Array, Array], tuple[Array, Array | None]]
    logits: bool = False


@dataclasses.dataclass(frozen=True)
class Power(Rule):
    r"""The argument is positive and the objective, the other arguments held, is :math:`a \log s - b\, s^m`.

    `coefficients(t, n, args)` returns `(a, b)` shaped like the argument's batch; the maximum is at
    `s = (a / (m b))^(1/m)`.
    """

    coefficients: Callable[[Any, Array, Args], tuple[Array, Array]]
    degree: float


@dataclasses.dataclass(frozen=True)
class Location(Rule):
    """The objective is quadratic and concave in the argument, the others held: solved by one exact Newton step."""


@dataclasses.dataclass(frozen=True)
class Direction(Rule):
    r"""The argument is an angle and the objective, the other arguments held, is :math:`C \cos s + S \sin s`.

    `resultant(t, n, args)` returns `(C, S)` shaped like the argument's batch; the maximum is at `s = atan2(S, C)`.
    """

    resultant: Callable[[Array, Array, Args], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Median(Rule):
    r"""The argument is a location; each row's objective falls linearly away from it, at another slope on each side.

    It is :math:`-a (x - s)` where `x` is above `s` and :math:`-b (s - x)` where it is below, with `(a, b) =
    slopes(args)`: a median where they are equal, a quantile otherwise. Takes all of `args` and `fixed`.
    """

    slopes: Callable[[Args], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Covariance(Rule):
    """The argument is a positive definite matrix in the `form` 'covariance', 'precision' or 'tril' (Cholesky factor).

    `scatter(t, n, args)` returns the expected scatter matrix about the current location, `(*batch, d, d)`.
    """

    scatter: Callable[[Any, Array, Args], Array]
    form: str


@dataclasses.dataclass(frozen=True)
class NoClosedForm(Rule):
    """The argument has no closed form; `reason` says why, and Newton's method is used on it."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Family:
    """An exponential family: its statistics, natural parameters and M-step rules, with a source.

    Attributes:
        name: the distribution's usual name.
        args: names of the parameters, as attributes of the NumPyro distribution. Of alternatives (`covariance_matrix`
            or `precision_matrix`) each has a `Family` of its own, chosen by `when`.
        rules: for each of `args`, how the M-step solves for it.
        features: `T(x)`, from `(*event, *batch)` to `(p, *batch)`. Takes the dict of `fixed` arguments second.
        natural: from the dict of args to `(eta (*batch, p), A (*batch,))`; `eta` and the statistics that it goes with
            may be several arrays, `Products` of a regression.
        base: `h(x)`, from `(*event, *batch)` to `(*batch,)`. Takes the dict of `fixed` arguments second.
        event_dim: number of axes of one draw: 0 or 1.
        arg_dims: number of trailing event axes of each of `args`, in order.
        fixed: attributes that must be data (`total_count`): they enter `features` and `base` (batch axes only).
        standardise: for location-scale families, the arguments of `(x - centre) / scale` given those of `x`; `centre`
            and `scale` broadcast against a scalar event's batch or are the vector event `(d,)`. Takes (args, centre,
            scale).
        when: attribute that must have been given to the constructor for this entry to apply, or None.
        otherwise: for families with `fixed` attributes, the sentence for the plan where one of them is not data.
        sized_by: the argument whose last axis has the length `p` that `features` cannot read off the values (the number
            of categories); `features` finds it under "size". Empty where the values tell.
        looks_up: whether the statistics are one for the value's own category and zero for the others, so that a log
            density is an entry of `eta`, read by the value.
        fixed_rules: for those of `fixed` that may be solved for where the site is evaluated row by row, how.
        bounds: those of `args` and `fixed` that the support depends on; no parameter may stand in them.
        source: where the natural form and its maximum are derived.
    """

    name: str
    args: tuple[str, ...]
    rules: Mapping[str, Rule]
    features: Callable[[Array, Args], Array]
    natural: Callable[[Args], tuple[Any, Array]]
    base: Callable[[Array, Args], Array]
    source: str
    event_dim: int = 0
    arg_dims: tuple[int, ...] = ()
    fixed: tuple[str, ...] = ()
    standardise: Callable[[Args, Array, Array], dict[str, Array]] | None = None
    when: str | None = None
    otherwise: str = ""
    sized_by: str = ""
    looks_up: bool = False
    fixed_rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    bounds: tuple[str, ...] = ()

    def __post_init__(self):
        if set(self.rules) != set(self.args):
            raise ValueError(f"Family({self.name!r}): rules name {sorted(self.rules)}, args name {sorted(self.args)}")
        if not self.arg_dims:
            object.__setattr__(self, "arg_dims", (0,) * len(self.args))

    def data_of(self, distribution: Any) -> dict[str, Any]:
        """What `features` and `base` take second: the `fixed` attributes of `distribution`, and "size" where needed."""
        data: dict[str, Any] = {name: getattr(distribution, name) for name in self.fixed}
        if self.sized_by:
            data["size"] = jnp.shape(getattr(distribution, self.sized_by))[-1]
        return data


def nothing(distribution: Any) -> dict[str, Any]:
    """What is read of a distribution that no augmentation serves."""
    del distribution
    return {}


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A distribution known to have no natural form in all its arguments; its own `log_prob` is used.

    `reason` is the sentence that the plan prints; `nearest` names the rewrite that would have a closed form, or is
    empty. `bounded` says that its support depends on its arguments, all of them: no parameter may stand in them.
    `parts` gives what an augmentation reads of a distribution, by name.
    """

    name: str
    reason: str
    nearest: str = ""
    source: str = ""
    bounded: bool = False
    parts: Callable[[Any], Mapping[str, Any]] = nothing


_REGISTRY: dict[type, list[Family | Opaque]] = {}


def register_family(cls: type, family: Family | Opaque) -> None:
    """Teach autoem that the NumPyro distribution class `cls` is `family`.

    Args:
        cls: the class itself, for instance `numpyro.distributions.Exponential`.
        family: its record.

    Raises:
        ValueError: an entry for `cls` (with the same `when`) is registered already; entries are never replaced.
    """
    entries = _REGISTRY.setdefault(cls, [])
    for entry in entries:
        if getattr(entry, "when", None) == getattr(family, "when", None):
            raise ValueError(f"{cls.__name__} is registered already (source: {entry.source or entry.name})")
    entries.append(family)


def family_of(distribution: Any) -> Family | Opaque | None:
    """The entry that describes `distribution` (unwrapped), or None where nothing is registered for its exact class."""
    for entry in _REGISTRY.get(type(distribution), ()):
        when = getattr(entry, "when", None)
        if when is None or when in vars(distribution):
            return entry
    return None


def registered_families() -> dict[type, tuple[Family | Opaque, ...]]:
    """Every registered class with its entries, in order of registration."""
    return {cls: tuple(entries) for cls, entries in _REGISTRY.items()}
