"""The models of the reference cases with continuous latents, as a reader of NumPyro would write them."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from .case_models import positive


def robust_regression(d):
    """Errors of Student's t with four degrees of freedom: a Normal whose precision is a Gamma's in every row."""
    y, freedom = d["y"], 4.0
    x = jnp.stack([jnp.ones(len(y)), d["air_flow"], d["water_temp"], d["acid_conc"]], -1)
    beta = numpyro.param("beta", jnp.linalg.lstsq(x, y)[0])
    sigma = positive("sigma", y.std())
    with numpyro.plate("rows", len(y)):
        u = numpyro.sample("u", dist.Gamma(freedom / 2, freedom / 2))
        numpyro.sample("y", dist.Normal(x @ beta, sigma / jnp.sqrt(u)), obs=y)


def negative_binomial(d):
    shape, mean = positive("shape", 1.0), positive("mean", 1.0)
    with numpyro.plate("rows", len(d["y"])):
        rate = numpyro.sample("rate", dist.Gamma(shape, shape / mean))
        numpyro.sample("y", dist.Poisson(rate), obs=d["y"])


def beta_binomial(d):
    a, b = positive("a", 1.0), positive("b", 1.0)
    with numpyro.plate("litters", len(d["n"])):
        p = numpyro.sample("p", dist.Beta(a, b))
        numpyro.sample("y", dist.Binomial(d["n"], p), obs=d["y"])


def censored_waiting(d):
    y, seen = d["weeks"], d["seen"] == 1
    rate = positive("rate", jnp.array([0.1, 0.1]))
    law = dist.Exponential(rate[d["drug"]])
    with numpyro.plate("rows", len(y)):
        with numpyro.handlers.mask(mask=~seen):
            whole = numpyro.sample("whole", law)
        numpyro.factor("censoring", jnp.where(seen | (whole > y), 0.0, -jnp.inf))
        with numpyro.handlers.mask(mask=seen):
            numpyro.sample("y", law, obs=y)


def censored_regression(d):
    y, seen = d["y"], d["seen"] == 1
    x = jnp.stack([jnp.ones(len(y)), d["inv_temp"]], -1)
    beta = numpyro.param("beta", jnp.linalg.lstsq(x, y)[0])
    law = dist.Normal(x @ beta, positive("sigma", y.std()))
    with numpyro.plate("rows", len(y)):
        with numpyro.handlers.mask(mask=~seen):
            whole = numpyro.sample("whole", law)
        numpyro.factor("censoring", jnp.where(seen | (whole > y), 0.0, -jnp.inf))
        with numpyro.handlers.mask(mask=seen):
            numpyro.sample("y", law, obs=y)


def item_response(common: bool):
    """Items of the same slope (Rasch), or with one each (two-parameter logistic)."""

    def model(d):
        y = jnp.stack([d[f"item{j}"] for j in range(1, 6)], -1)
        easiness = numpyro.param("easiness", jnp.zeros(5))
        slope = numpyro.param("slope", 1.0 if common else jnp.ones(5))
        with numpyro.plate("people", len(y)):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = easiness + slope * ability[..., None]
            numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model
