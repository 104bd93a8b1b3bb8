"""The laws that every family of the table obeys; registering a family puts it under all of them.

Arguments are drawn through NumPyro's own bijections from unconstrained numbers, so a gradient in those numbers respects
every constraint (a simplex, a positive definite matrix) with no special cases.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to

from autoem.families import (
    Counting,
    Covariance,
    Direction,
    Family,
    Location,
    NoClosedForm,
    Opaque,
    Power,
    family_of,
    register_family,
    registered_families,
)

BATCH, EVENT = 3, 4
ROWS = 4000


@dataclasses.dataclass(frozen=True)
class Case:
    """How to draw one class: values of its `fixed` attributes, cycled over the rows, and NumPyro's own accuracy."""

    fixed: dict = dataclasses.field(default_factory=dict)
    rtol: float = 1e-11


CASES = {
    dist.BernoulliProbs: Case(),
    dist.BernoulliLogits: Case(),
    dist.BinomialProbs: Case({"total_count": [1, 4, 9, 30]}),
    dist.BinomialLogits: Case({"total_count": [1, 4, 9, 30]}),
    dist.CategoricalProbs: Case(),
    dist.CategoricalLogits: Case(),
    dist.MultinomialProbs: Case({"total_count": [1, 4, 9, 30]}),
    dist.MultinomialLogits: Case({"total_count": [1, 4, 9, 30]}),
    dist.GeometricProbs: Case(),
    dist.GeometricLogits: Case(),
    dist.NegativeBinomialProbs: Case({"total_count": [0.75, 2.0, 20.0]}),
    dist.NegativeBinomialLogits: Case({"total_count": [0.75, 2.0, 20.0]}),
    dist.Poisson: Case(),
    dist.Normal: Case(),
    dist.LogNormal: Case(),
    dist.HalfNormal: Case(),
    dist.MultivariateNormal: Case(),
    dist.Exponential: Case(),
    dist.Gamma: Case(),
    dist.Chi2: Case(),
    dist.InverseGamma: Case(),
    dist.Beta: Case(),
    dist.BetaProportion: Case(),
    dist.Dirichlet: Case(),
    dist.VonMises: Case(),
    dist.Pareto: Case({"scale": [0.5, 1.0, 3.0]}),
    dist.Levy: Case({"loc": [-1.0, 0.0, 2.5]}),
    dist.Laplace: Case({"loc": [-1.0, 0.0, 2.5]}),
    dist.AsymmetricLaplace: Case({"loc": [-1.0, 0.0, 2.5], "asymmetry": [0.5, 3.0]}),
    dist.AsymmetricLaplaceQuantile: Case({"loc": [-1.0, 0.0, 2.5], "quantile": [0.2, 0.9]}),
}

ENTRIES = [(cls, entry) for cls, entries in registered_families().items() for entry in entries]


def _identity(pair):
    cls, entry = pair
    return f"{cls.__name__}-{entry.when}" if getattr(entry, "when", None) else cls.__name__


FAMILIES = [(cls, entry) for cls, entry in ENTRIES if isinstance(entry, Family)]
SEVERAL = [pair for pair in FAMILIES if len(pair[1].args) > 1]
WHOLE = [pair for pair in FAMILIES if not any(pair[1].arg_dims) and pair[0] is not dist.BetaProportion]
STANDARDISED = [pair for pair in FAMILIES if pair[1].standardise]
OPAQUE = [(cls, entry) for cls, entry in ENTRIES if isinstance(entry, Opaque)]
each_family = pytest.mark.parametrize(("cls", "family"), FAMILIES, ids=map(_identity, FAMILIES))
RULES = [(cls, family, arg) for cls, family in FAMILIES for arg in family.args]
SOLVED = [(cls, family, arg) for cls, family, arg in RULES if not isinstance(family.rules[arg], NoClosedForm)]


class Setting(NamedTuple):
    """Arguments `(BATCH, ...)` as free numbers and as themselves; the distribution, and a draw `(ROWS, BATCH, ...)`."""

    free: dict
    constrain: Callable
    args: dict
    distribution: Any
    x: Any


def _free(cls, family, key):
    """Unconstrained numbers for every argument, and the map from them to the arguments."""
    maps = {a: biject_to(cls.arg_constraints[a]) for a in family.args}
    shapes = {a: (BATCH, *(EVENT,) * d) for a, d in zip(family.args, family.arg_dims, strict=True)}
    keys = dict(zip(family.args, jax.random.split(key, len(family.args)), strict=True))
    free = {a: 0.7 * jax.random.normal(keys[a], maps[a].inverse_shape(shapes[a])) for a in family.args}
    return free, lambda u: {a: maps[a](u[a]) for a in u}


def _fixed(cls):
    """The fixed attributes of the case, cycled over the rows."""
    return {a: jnp.asarray(np.resize(v, ROWS))[:, None] for a, v in CASES[cls].fixed.items()}


@functools.cache
def _setting(cls, which):
    family = registered_families()[cls][which]
    assert isinstance(family, Family)
    key_args, key_draw = jax.random.split(jax.random.key(0))
    free, constrain = _free(cls, family, key_args)
    args = jax.jit(constrain)(free)
    distribution = cls(**args, **_fixed(cls))
    rows = () if distribution.batch_shape == (ROWS, BATCH) else (ROWS,)
    return Setting(free, constrain, args, distribution, jax.jit(lambda key: distribution.sample(key, rows))(key_draw))


def _setting_of(cls, family):
    return _setting(cls, registered_families()[cls].index(family))


@functools.cache
def _parts(cls, which, size):
    """All parts of a density, compiled once for all the laws."""
    family = registered_families()[cls][which]

    @jax.jit
    def parts(args, data, x):
        values, data = (jnp.moveaxis(x, -1, 0) if family.event_dim else x), {**data, **dict(size)}
        return family.features(values, data), *family.natural(args), family.base(values, data)

    return parts


def _natural(family, distribution, args, x):
    """`T (p, ROWS, BATCH)`, `eta (BATCH, p)`, `A (BATCH,)`, `h (ROWS, BATCH)`."""
    data = family.data_of(distribution)
    size = tuple((name, data.pop(name)) for name in ("size",) if name in data)  # a shape: not to be traced
    cls = type(distribution)
    return _parts(cls, registered_families()[cls].index(family), size)(args, data, x)


@jax.jit
def _log_density(statistics, eta, normaliser, base):
    return jnp.einsum("...p,p...->...", eta, statistics) - normaliser + base


def test_every_family_has_a_case():
    assert {cls for cls, _ in FAMILIES} == set(CASES)


@each_family
def test_natural_form_is_the_log_density(cls, family):
    """Also: the arguments are attributes of the distribution, shapes are as promised, the entry is found again."""
    _, _, args, distribution, x = _setting_of(cls, family)
    assert family_of(distribution) is family
    statistics, eta, normaliser, base = _natural(family, distribution, args, x)
    assert statistics.shape == (eta.shape[-1], ROWS, BATCH)
    assert (eta.shape[:-1], normaliser.shape, base.shape) == ((BATCH,), (BATCH,), (ROWS, BATCH))
    expected = jax.jit(distribution.log_prob)(x)
    rtol = CASES[cls].rtol
    np.testing.assert_allclose(_log_density(statistics, eta, normaliser, base), expected, rtol=rtol, atol=10 * rtol)
    for name in args:
        np.testing.assert_allclose(jnp.reshape(getattr(distribution, name), args[name].shape), args[name], rtol=1e-15)


@pytest.mark.parametrize(("cls", "family"), SEVERAL, ids=map(_identity, SEVERAL))
def test_arguments_broadcast(cls, family):
    """An argument without batch axes, beside others with them, gives the same as its copies."""
    args, natural = _setting_of(cls, family).args, jax.jit(family.natural)
    for shared in family.args:
        alone = natural({**args, shared: args[shared][0]})
        copied = natural({**args, shared: jnp.broadcast_to(args[shared][0], args[shared].shape)})
        for found, expected in zip(alone, copied, strict=True):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "family"), WHOLE, ids=map(_identity, WHOLE))
def test_whole_number_arguments_are_read_as_floats(cls, family):
    """`Normal(0, 1)` holds integers."""
    for found, expected in zip(
        family.natural({a: jnp.array([1, 1]) for a in family.args}),
        family.natural({a: jnp.array([1.0, 1.0]) for a in family.args}),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("cls", "family"), STANDARDISED, ids=map(_identity, STANDARDISED))
def test_standardised_data_have_the_same_density(cls, family):
    """log p(x | a) = log p((x - c) / s | standardise(a, c, s)) - sum log s."""
    _, _, args, distribution, x = _setting_of(cls, family)
    width = EVENT if family.event_dim else BATCH
    centre, scale = jnp.linspace(-3, 40, width), jnp.geomspace(0.1, 30, width)
    moved = family.standardise(args, centre, scale)
    assert set(moved) == set(args)
    found = _log_density(*_natural(family, distribution, moved, (x - centre) / scale))
    jacobian = jnp.log(scale).sum() if family.event_dim else jnp.log(scale)
    # whitened about a centre far off: second moments of up to 400^2 cancel
    np.testing.assert_allclose(found - jacobian, distribution.log_prob(x), rtol=1e-9, atol=1e-9)


def _newton(objective, start):
    flat, restore = ravel_pytree(start)

    def of_flat(v):
        return objective(restore(v))

    return restore(flat - jnp.linalg.solve(jax.hessian(of_flat)(flat), jax.grad(of_flat)(flat)))


def _solve_counting(rule, t, n):
    a, b = rule.counts(t, n)
    if b is None:
        probs = a / a.sum(-1, keepdims=True)
        return jnp.log(probs) if rule.logits else probs
    return jnp.log(a) - jnp.log(b) if rule.logits else a / (a + b)


def _solve_covariance(rule, t, n, args):
    covariance = rule.scatter(t, n, args) / n[..., None, None]
    forms = {"covariance": lambda c: c, "precision": jnp.linalg.inv, "tril": jnp.linalg.cholesky}
    return forms[rule.form](covariance)


def _solve(rule, t, n, args, arg, objective):
    match rule:
        case Counting():
            return _solve_counting(rule, t, n)
        case Power():
            a, b = rule.coefficients(t, n, args)
            return (a / (rule.degree * b)) ** (1 / rule.degree)
        case Location():
            return _newton(objective, args[arg])
        case Direction():
            cosine, sine = rule.resultant(t, n, args)
            return jnp.arctan2(sine, cosine)
        case Covariance():
            return _solve_covariance(rule, t, n, args)
    raise TypeError(rule)


@pytest.mark.parametrize(
    ("cls", "family", "arg"), SOLVED, ids=[f"{_identity((cls, family))}-{arg}" for cls, family, arg in SOLVED]
)
def test_rule_finds_the_maximum(cls, family, arg):
    """At the rule's answer the gradient of the expected log-likelihood vanishes, along the constraint, others held."""
    rule = family.rules[arg]
    _, constrain, args, distribution, x = _setting_of(cls, family)
    weight = jax.random.gamma(jax.random.key(4), 0.5, x.shape[:2])
    statistics = _natural(family, distribution, args, x)[0]
    t, n = jnp.einsum("nb,pnb->bp", weight, statistics), weight.sum(0)
    start, _ = _free(cls, family, jax.random.key(5))  # away from the truth
    others = jax.jit(constrain)(start)

    @jax.jit
    def objective(value):
        eta, normaliser = family.natural({**others, arg: value})
        return ((eta * t).sum(-1) - normaliser * n).sum()

    solved = _solve(rule, t, n, others, arg, objective)
    assert solved.shape == others[arg].shape
    to_arg = biject_to(cls.arg_constraints[arg])
    gradient = jax.jit(jax.grad(lambda u: objective(to_arg(u))))(to_arg.inv(solved)) / n.sum()
    np.testing.assert_allclose(gradient, 0, atol=1e-9)
    nearby = to_arg.inv(solved) + 0.1 * jax.random.normal(jax.random.key(6), gradient.shape)
    assert objective(to_arg(nearby)) <= objective(solved)


@each_family
def test_score_has_mean_zero(cls, family):
    """E[T] = grad A in the natural parameters, pulled back to free ones (counts are redundant: only that is defined).

    Of about 600 means each lies within 6 standard errors but for 2e-9 of them, so a right table fails one choice
    of seeds in a million (or a little more, as the means are not quite normal).
    """
    setting = _setting_of(cls, family)
    statistics = _natural(family, setting.distribution, setting.args, setting.x)[0]
    flat, restore = ravel_pytree(setting.free)
    slopes = jax.jit(jax.jacfwd(lambda v: family.natural(setting.constrain(restore(v)))))
    slope_eta, slope_normaliser = slopes(flat)
    score = jnp.einsum("bpu,pnb->nbu", slope_eta, statistics) - slope_normaliser
    error = score.std(0) / math.sqrt(ROWS)
    assert bool((jnp.abs(score.mean(0)) <= 6 * error + 1e-9).all())


@each_family
def test_float32_stays_float32(cls, family):
    """From the same numbers, the float64 log density to the rounding of the terms that are summed."""
    setting = _setting_of(cls, family)
    args = {a: np.asarray(v, np.float32) for a, v in setting.args.items()}
    draws = np.asarray(setting.x)
    x = draws.astype(np.int32 if np.issubdtype(draws.dtype, np.integer) else np.float32)
    with jax.enable_x64(False):
        narrow = _natural(family, cls(**args, **_fixed(cls)), args, x)
        assert {part.dtype for part in narrow} == {jnp.dtype(jnp.float32)}
        found = np.asarray(_log_density(*narrow), np.float64)
    wide_args, wide_x = jax.tree.map(lambda v: np.asarray(v, np.promote_types(v.dtype, np.int64)), (args, x))
    wide = _natural(family, setting.distribution, wide_args, wide_x)
    statistics, eta, normaliser, base = (jnp.abs(part) for part in wide)
    size = _log_density(statistics, eta, -normaliser, base) + 1
    inside = np.isfinite(size)  # a draw may round onto the edge of the support, as a Beta's to 1
    assert inside.mean() > 0.9
    # besides the sum itself: the condition of a covariance, and gamma functions of large counts that cancel
    error = np.abs(found - _log_density(*wide))[inside]
    assert (error <= 100 * np.finfo(np.float32).eps * size[inside]).all()


@pytest.mark.parametrize(("cls", "entry"), OPAQUE, ids=map(_identity, OPAQUE))
def test_opaque_entries_speak(cls, entry):
    assert entry.reason and "\n" not in entry.reason + entry.nearest
    assert not entry.reason.endswith(".")


@each_family
def test_family_names_its_source_and_reasons(cls, family):
    assert family.source
    assert bool(family.otherwise) == bool(family.fixed)
    reasons = [rule.reason for rule in family.rules.values() if isinstance(rule, NoClosedForm)]
    assert all(reason and "\n" not in reason for reason in reasons)


@pytest.mark.parametrize(("cls", "entry"), ENTRIES, ids=map(_identity, ENTRIES))
def test_entries_are_never_replaced(cls, entry):
    with pytest.raises(ValueError, match=rf"^{cls.__name__} is registered already"):
        register_family(cls, entry)


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (dist.Categorical(jnp.array([0.5, 0.5, 0.0])), jnp.array([0, 1, 2])),
        (dist.Categorical(logits=jnp.array([0.0, 0.0, -jnp.inf]), validate_args=False), jnp.array([0, 1, 2])),
        (dist.Multinomial(2, jnp.array([0.5, 0.5, 0.0])), jnp.array([[2, 0, 0], [1, 1, 0], [1, 0, 1]])),
        (dist.Poisson(0.0), jnp.array([0, 0, 1])),
    ],
    ids=["probs", "logits", "multinomial", "poisson"],
)
def test_hard_zeros(distribution, value):
    """The possible is exact, the impossible hugely negative and finite, and gradients are numbers."""
    family = family_of(distribution)
    assert isinstance(family, Family)
    args = {a: jnp.asarray(getattr(distribution, a)) for a in family.args}

    def log_density(args):
        return _log_density(*_natural(family, distribution, args, value))

    found = log_density(args)
    np.testing.assert_allclose(found[:2], distribution.log_prob(value)[:2], rtol=1e-14)
    assert jnp.isfinite(found[2]) and found[2] < -1e100
    slopes = jax.jacobian(log_density)(args)
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes.values())


@pytest.mark.parametrize("probs", [0.0, 1.0])
def test_certain_bernoulli_is_numpyros(probs):
    distribution, value = dist.Bernoulli(probs), jnp.array([0, 1])
    family = family_of(distribution)
    assert isinstance(family, Family)
    found = _log_density(*_natural(family, distribution, {"probs": jnp.asarray(probs)}, value))
    np.testing.assert_allclose(found, distribution.log_prob(value), rtol=1e-13, atol=1e-15)


SURE = {
    "Bernoulli": (dist.BernoulliProbs, dist.BernoulliLogits, {}, 0, 1),
    "Binomial": (dist.BinomialProbs, dist.BinomialLogits, {"total_count": 3}, 0, 3),
    "Geometric": (dist.GeometricProbs, dist.GeometricLogits, {}, None, 0),
    "NegativeBinomial": (dist.NegativeBinomialProbs, dist.NegativeBinomialLogits, {"total_count": 2.0}, 0, None),
}


@pytest.mark.parametrize("probs", [0.0, 1.0])
@pytest.mark.parametrize("name", SURE)
def test_what_is_certain_has_log_density_zero(name, probs):
    """By 0 log 0 = 0, which NumPyro does not keep to everywhere; all else is far below and finite."""
    of_probs, of_logits, fixed, *certain = SURE[name]
    for cls, arg, value in ((of_probs, "probs", probs), (of_logits, "logits", np.inf if probs else -np.inf)):
        family = registered_families()[cls][0]
        assert isinstance(family, Family)
        data, x = {k: jnp.asarray(v) for k, v in fixed.items()}, jnp.arange(2 if name == "Bernoulli" else 4)
        eta, normaliser = family.natural({arg: jnp.asarray(value)})
        found = _log_density(family.features(x, data), eta, normaliser, family.base(x, data))
        sure = x == (-1 if certain[int(probs)] is None else certain[int(probs)])
        np.testing.assert_allclose(found[sure], 0, atol=1e-14)
        assert (found[~sure] < -30).all() and np.isfinite(found).all()


@each_family
def test_single_precision_data_are_taken_in_double(cls, family):
    """Where double is on, as NumPyro takes them: squares and cosines of float32 would be off by 1e-7."""
    setting = _setting_of(cls, family)
    x = jnp.asarray(setting.x)
    narrow = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.int8)
    found = _natural(family, setting.distribution, setting.args, narrow)
    wide = _natural(family, setting.distribution, setting.args, narrow.astype(x.dtype))
    for a, b in zip(found, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14)
