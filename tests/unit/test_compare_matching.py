"""Label switching: which relabellings leave a model as it is, and which one matches best."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import autoem
from autoem.baselines import GradientAscent
from autoem.comparison import match
from autoem.comparison.row import Latents
from autoem.comparison.strategies import base_of
from autoem.comparison.yardstick import find

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.concatenate([RNG.normal(-4, 1, 40), RNG.normal(0, 1, 60), RNG.normal(5, 1, 30)])


def mixture(x, k=3):
    weights = numpyro.param("weights", jnp.ones(k) / k, constraint=constraints.simplex)
    loc = numpyro.param("loc", jnp.arange(k) * 1.0)
    scale = numpyro.param("scale", 2.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def chain(y):
    first = numpyro.param("first", jnp.array([0.6, 0.4]), constraint=constraints.simplex)
    move = numpyro.param("move", jnp.array([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
    rate = numpyro.param("rate", jnp.array([1.0, 4.0]), constraint=constraints.positive)

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(move[z]))
        numpyro.sample("y", dist.Poisson(rate[z]), obs=y)
        return z, None

    start = numpyro.sample("start", dist.Categorical(first))
    numpyro.sample("y_start", dist.Poisson(rate[start]), obs=y[0])
    scan(step, start, y[1:])


def judges(votes):
    """The classes of the latent are those of the votes: they have names, and may not be exchanged."""
    prior = numpyro.param("prior", jnp.array([0.6, 0.4]), constraint=constraints.simplex)
    hit = numpyro.param("hit", jnp.array([0.8, 0.7, 0.9]), constraint=constraints.unit_interval)
    with numpyro.plate("items", votes.shape[0], dim=-2):
        z = numpyro.sample("z", dist.Bernoulli(prior[1]))
        with numpyro.plate("judges", 3, dim=-1):
            numpyro.sample("vote", dist.Bernoulli(jnp.where(z == 1, hit, 0.1)), obs=votes)


def symmetries_of(model, *args):
    yardstick = find(base_of(model), [], 1, KEY, args, {}, None)
    params = {n: np.asarray(v) for n, v in yardstick.target.starts[0].items()}
    return yardstick, params, match.symmetries(yardstick, params)


def test_components_of_a_mixture_may_change_places():
    yardstick, params, found = symmetries_of(mixture, X)
    assert [(s.latents, s.states, dict(s.axes)) for s in found] == [(("z",), 3, {"weights": (0,), "loc": (0,)})]
    for order in itertools.permutations(range(3)):
        moved = found[0].apply(params, order)
        assert yardstick.measure(moved)[0] == pytest.approx(yardstick.measure(params)[0], abs=1e-8)


def test_the_states_of_a_chain_are_relabelled_along_with_its_start():
    _, _, found = symmetries_of(chain, RNG.poisson(np.repeat([1, 5], 10)))
    assert [set(s.latents) for s in found] == [{"start", "z"}]
    assert dict(found[0].axes) == {"first": (0,), "move": (0, 1), "rate": (0,)}


def test_classes_with_names_are_left_as_they_stand():
    assert symmetries_of(judges, RNG.integers(0, 2, (20, 3)))[2] == ()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_swapped_mixture_is_matched(order):
    """Parameters and marginals with their components in another order are at no distance once matched."""
    yardstick, params, found = symmetries_of(mixture, X)
    reference = {**params, "loc": np.array([-4.0, 0.0, 5.0]), "weights": np.array([0.3, 0.5, 0.2])}
    moved = found[0].apply(reference, order)
    latents = yardstick.latents(moved)
    back, after, orders = match.relabelled(found, moved, latents, reference)
    np.testing.assert_array_equal(back["loc"], reference["loc"])
    np.testing.assert_array_equal(back["weights"], reference["weights"])
    assert match.distance(back, reference) == 0
    assert match.variation(after, yardstick.latents(reference)) < 1e-12
    assert (order == (0, 1, 2)) == (not orders)


def test_many_components_are_matched_by_swaps():
    """Nine states are too many for every permutation to be tried."""
    symmetry = match.Symmetry(("z",), 9, {"loc": (0,), "move": (0, 1)})
    reference = {"loc": RNG.normal(size=9), "move": RNG.dirichlet(np.ones(9), 9)}
    order = tuple(RNG.permutation(9))
    moved = symmetry.apply(reference, order)
    matched = symmetry.apply(moved, symmetry.match(moved, reference))
    np.testing.assert_array_equal(matched["loc"], reference["loc"])
    np.testing.assert_array_equal(matched["move"], reference["move"])


def test_total_variation_and_shift_by_hand():
    a = Latents({"z": np.array([[0.5, 0.5], [1.0, 0.0]])}, {"u": (np.array([1.0, 2.0]), np.array([1.0, 1.0]))})
    b = Latents({"z": np.array([[0.1, 0.9], [1.0, 0.0]])}, {"u": (np.array([1.0, 6.0]), np.array([1.0, 2.0]))})
    assert match.variation(a, b) == pytest.approx(0.2)
    assert match.shift(a, b) == pytest.approx(np.sqrt((0 + 2**2) / 2))
    assert np.isnan(match.variation(a, Latents()))


def test_strategies_that_end_with_other_labels_are_brought_together():
    """Seeded starts, and an ascent that keeps them; both end on the same hill, whatever they call its parts."""
    found = autoem.compare(mixture, {"em": None, "adam": GradientAscent(steps=800)}, KEY, X, starts=3)
    assert found["adam"].log_joint == pytest.approx(found["em"].log_joint, abs=1e-4)
    assert found["adam"].distance < 0.01
    assert found["adam"].variation < 0.01
    assert found.matched == ("z",)
