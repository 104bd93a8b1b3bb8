"""Other Python libraries for hidden Markov models, near their defaults: the common start, every step, no prior."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from ._contender import CORES, Contender, Outcome
from .workloads import Workload


def _rows(w: Workload) -> np.ndarray:
    """The data with an axis of sequences in front and one of dimensions behind."""
    x = w.data["x"]
    return x.reshape(w.num_sequences, -1, x.shape[-1] if w.family != "symbols" else 1)


def hmmlearn(w: Workload) -> Callable[[], Outcome]:
    """hmmlearn's C++ recursions in scaled probabilities, with what it adds to variances taken away."""
    from hmmlearn import hmm

    logging.getLogger("hmmlearn").setLevel(logging.ERROR)  # a step at the rounding error is told as a fall
    rows, k = _rows(w), w.num_states
    lengths = [rows.shape[1]] * rows.shape[0]
    flat = rows.reshape(-1, rows.shape[2])
    options = {"init_params": "", "n_iter": w.num_steps, "tol": -np.inf, "implementation": "scaling"}

    def fresh():
        if w.family == "symbols":
            model = hmm.CategoricalHMM(k, **options)
            model.emissionprob_, model.n_features = w.start["emit"].copy(), w.start["emit"].shape[1]
        else:
            model = hmm.GaussianHMM(k, "diag", covars_prior=0.0, covars_weight=1.0, min_covar=0.0, **options)
            model.means_, model.covars_ = w.start["loc"].copy(), w.start["scale"] ** 2
        model.startprob_, model.transmat_ = w.start["start"].copy(), w.start["trans"].copy()
        return model

    def run() -> Outcome:
        model = fresh().fit(flat, lengths)
        chain = {"start": model.startprob_, "trans": model.transmat_}
        if w.family == "symbols":
            return Outcome({**chain, "emit": model.emissionprob_})
        return Outcome({**chain, "loc": model.means_, "scale": np.sqrt(model._covars_)})

    return run


_FLAT = 1 + 1e-12  # a concentration for which the mode of a Dirichlet is there and the prior is not felt


def _dynamax_gaussian(w: Workload):
    """The model, its start, and which of it is learnt; the prior is made flat after the start is drawn from it."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import DiagonalGaussianHMM

    d = w.start["loc"].shape[1]
    model = DiagonalGaussianHMM(w.num_states, d, _FLAT, _FLAT)
    given = {
        "initial_probs": jnp.asarray(w.start["start"]),
        "transition_matrix": jnp.asarray(w.start["trans"]),
        "emission_means": jnp.asarray(w.start["loc"]),
        "emission_scale_diags": jnp.asarray(w.start["scale"]),
    }
    params, learnt = model.initialize(jax.random.key(0), **given)
    own = model.emission_component
    own.emission_prior_mean_conc = own.emission_prior_scale = 0.0
    own.emission_prior_conc = jnp.full(d, -1.5)  # the mode divides by the concentration and this much
    return model, params, learnt


def _dynamax_categorical(w: Workload):
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import CategoricalHMM

    prior = {"initial_probs_concentration": _FLAT, "transition_matrix_concentration": _FLAT}
    num_symbols = w.start["emit"].shape[1]
    model = CategoricalHMM(w.num_states, 1, num_symbols, emission_prior_concentration=_FLAT, **prior)
    given = {"initial_probs": w.start["start"], "transition_matrix": w.start["trans"]}
    given["emission_probs"] = w.start["emit"][:, None]
    params, learnt = model.initialize(jax.random.key(0), **{n: jnp.asarray(v) for n, v in given.items()})
    return model, params, learnt


def dynamax(w: Workload) -> Callable[[], Outcome]:
    """dynamax's `fit_em`, compiled once for all fits (of itself it compiles at every call)."""
    import jax
    import jax.numpy as jnp

    model, params, learnt = (_dynamax_categorical if w.family == "symbols" else _dynamax_gaussian)(w)
    rows = jnp.asarray(_rows(w))
    fit = jax.jit(lambda p, x: model.fit_em(p, learnt, x, num_iters=w.num_steps, verbose=False)[0])

    def run() -> Outcome:
        found = jax.block_until_ready(fit(params, rows))
        out = {"start": found.initial.probs, "trans": found.transitions.transition_matrix}
        if w.family == "symbols":
            out["emit"] = found.emissions.probs[:, 0]
        else:
            out |= {"loc": found.emissions.means, "scale": found.emissions.scale_diags}
        return Outcome({name: np.asarray(value) for name, value in out.items()})

    return run


def pomegranate(w: Workload) -> Callable[[], Outcome]:
    """pomegranate's DenseHMM in float64, torch on every core; the end that it gives every sequence is taken away."""
    import torch
    from pomegranate.distributions import Categorical, Normal
    from pomegranate.hmm import DenseHMM

    torch.set_num_threads(CORES)
    torch.set_default_dtype(torch.float64)
    rows = torch.tensor(_rows(w))
    start = {name: torch.tensor(value) for name, value in w.start.items()}

    def fresh():
        if w.family == "symbols":
            own = [Categorical(e[None]) for e in start["emit"]]
        else:
            pairs = zip(start["loc"], start["scale"] ** 2, strict=True)
            own = [Normal(m.clone(), v, covariance_type="diag") for m, v in pairs]
        return DenseHMM(own, edges=start["trans"], starts=start["start"], ends=torch.ones(w.num_states))

    def run() -> Outcome:
        model = fresh()
        for _ in range(w.num_steps):
            model.summarize(rows)
            model._xw_ends_sum.zero_()
            model.from_summaries()
            model.ends[...] = 0.0  # its logarithm
        chain = {"start": np.exp(model.starts.numpy()), "trans": np.exp(model.edges.numpy())}
        own = model.distributions
        if w.family == "symbols":
            return Outcome({**chain, "emit": np.stack([e.probs.numpy()[0] for e in own])})
        loc, variance = np.stack([e.means.numpy() for e in own]), np.stack([e.covs.numpy() for e in own])
        return Outcome({**chain, "loc": loc, "scale": np.sqrt(variance)})

    return run


_FAMILIES = ("chain", "chains", "symbols")
CONTENDERS = tuple(
    Contender(name, family, prepare, imports, devices, note=note)
    for family in _FAMILIES
    for name, prepare, imports, devices, note in (
        ("hmmlearn", hmmlearn, ("hmmlearn.hmm",), 0, "scaling, no prior"),
        ("dynamax", dynamax, ("dynamax.hidden_markov_model",), 1, "no prior, compiled once"),
        ("pomegranate", pomegranate, ("torch", "pomegranate.hmm"), 0, "float64, torch, no end"),
    )
)
