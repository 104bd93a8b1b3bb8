"""The models of the reference cases: dictionaries of columns in, plain NumPyro text, nothing that knows of autoem.

Each is written as its author would write it for NumPyro alone, without marks for enumeration and without shape tricks;
`d` holds the columns of the data file. Where several cases differ in their size only, a function returns the model.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

NEVER = -1e30  # the log probability of what was not seen


def simplex(name, value):
    return numpyro.param(name, value, constraint=constraints.simplex)


def probability(name, value):
    return numpyro.param(name, value, constraint=constraints.unit_interval)


def positive(name, value):
    return numpyro.param(name, value, constraint=constraints.positive)


def covariance(name, value):
    return numpyro.param(name, value, constraint=constraints.positive_definite)


def two_coins(d):
    theta = probability("theta", jnp.array([0.6, 0.5]))
    pi = jnp.array([0.5, 0.5])
    with numpyro.plate("sets", len(d["heads"])):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("heads", dist.Binomial(d["tosses"], theta[z]), obs=d["heads"])


def linkage(d):
    theta = probability("theta", 0.5)
    # five cells of complete data, of which the first two are seen only as their sum
    cells = jnp.stack([jnp.asarray(0.5), theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
    seen = jnp.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    with numpyro.plate("animals", len(d["phenotype"])):
        g = numpyro.sample("g", dist.Categorical(cells))
        numpyro.sample("phenotype", dist.Categorical(seen[g]), obs=d["phenotype"])


def blood_groups(d):
    freq = simplex("freq", jnp.full(3, 1 / 3))  # alleles A, B, O
    phenotype = jnp.array([[0, 2, 0], [2, 1, 1], [0, 1, 3]])  # (mother's, father's allele) -> A, B, AB, O
    with numpyro.plate("people", len(d["phenotype"])):
        a1 = numpyro.sample("a1", dist.Categorical(freq))
        a2 = numpyro.sample("a2", dist.Categorical(freq))
        onehot = jax.nn.one_hot(phenotype[a1, a2], 4)
        numpyro.sample("phenotype", dist.Categorical(onehot), obs=d["phenotype"])


def haplotypes(d):
    freq = simplex("freq", jnp.full(4, 0.25))  # MS, Ms, NS, Ns
    n_count, s_count = jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
    with numpyro.plate("people", len(d["mn"])):
        h1 = numpyro.sample("h1", dist.Categorical(freq))
        h2 = numpyro.sample("h2", dist.Categorical(freq))
        numpyro.sample("mn", dist.Categorical(jax.nn.one_hot(n_count[h1] + n_count[h2], 3)), obs=d["mn"])
        numpyro.sample("ss", dist.Categorical(jax.nn.one_hot(s_count[h1] + s_count[h2], 3)), obs=d["ss"])


def poisson_mixture(d):
    pi = simplex("pi", jnp.full(2, 1 / 2))
    rate = positive("rate", jnp.linspace(0.5, 1.5, 2) * d["count"].mean())
    with numpyro.plate("rows", len(d["count"])):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("count", dist.Poisson(rate[z]), obs=d["count"])


def _spread_means(x, k):
    return numpyro.param("mu", x[:: len(x) // k][:k])


def gaussian_vvv(columns, k):
    """A full covariance for each component."""

    def model(d):
        x = jnp.stack([d[c] for c in columns], -1)
        pi, mu = simplex("pi", jnp.full(k, 1 / k)), _spread_means(x, k)
        sigma = covariance("Sigma", jnp.tile(jnp.cov(x.T), (k, 1, 1)))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.MultivariateNormal(mu[z], sigma[z]), obs=x)

    return model


def gaussian_eee(columns, k):
    """One full covariance, common to all components."""

    def model(d):
        x = jnp.stack([d[c] for c in columns], -1)
        pi, mu = simplex("pi", jnp.full(k, 1 / k)), _spread_means(x, k)
        sigma = covariance("Sigma", jnp.cov(x.T))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.MultivariateNormal(mu[z], sigma), obs=x)

    return model


def gaussian_vvi(columns, k):
    """A diagonal covariance for each component."""

    def model(d):
        x = jnp.stack([d[c] for c in columns], -1)
        pi, mu = simplex("pi", jnp.full(k, 1 / k)), _spread_means(x, k)
        sd = positive("sd", jnp.tile(x.std(0), (k, 1)))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.Normal(mu[z], sd[z]).to_event(1), obs=x)

    return model


def gaussian_eii(columns, k):
    """One spherical covariance, common to all components."""

    def model(d):
        x = jnp.stack([d[c] for c in columns], -1)
        pi, mu = simplex("pi", jnp.full(k, 1 / k)), _spread_means(x, k)
        sd = positive("sd", x.std())
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.Normal(mu[z], sd).to_event(1), obs=x)

    return model


def gene_clusters(d):
    """One standard deviation for each gene, common to all clusters: bounded although genes outnumber samples."""
    x = d["x"]
    pi, mu = simplex("pi", jnp.full(3, 1 / 3)), _spread_means(x, 3)
    sd = positive("sd", x.std(0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("x", dist.Normal(mu[z], sd).to_event(1), obs=x)


def _node(d, name, prob):
    value = numpyro.sample("v_" + name, dist.Bernoulli(prob))
    numpyro.factor("seen_" + name, jnp.where((d[name] >= 0) & (value != d[name]), NEVER, 0.0))  # -1: missing
    return value


def asia(d):
    p = {
        name: probability("p_" + name, jnp.full(size, 0.4))
        for name, size in dict(asia=1, smoke=1, tub=2, lung=2, bronc=2, either=4, xray=2, dysp=4).items()
    }
    with numpyro.plate("rows", len(d["asia"])):
        asia = _node(d, "asia", p["asia"][0])
        smoke = _node(d, "smoke", p["smoke"][0])
        tub = _node(d, "tub", p["tub"][asia])
        lung = _node(d, "lung", p["lung"][smoke])
        bronc = _node(d, "bronc", p["bronc"][smoke])
        either = _node(d, "either", p["either"][2 * tub + lung])
        _node(d, "xray", p["xray"][either])
        _node(d, "dysp", p["dysp"][2 * bronc + either])


def coronary(d):
    p = {
        name: probability("p_" + name, jnp.full(size, 0.4))
        for name, size in dict(smoking=1, mental_work=1, physical_work=2, proteins=4, pressure=4, family=2).items()
    }
    with numpyro.plate("rows", len(d["smoking"])):
        smoking = _node(d, "smoking", p["smoking"][0])
        mental_work = _node(d, "mental_work", p["mental_work"][0])
        _node(d, "physical_work", p["physical_work"][mental_work])
        proteins = _node(d, "proteins", p["proteins"][2 * smoking + mental_work])
        _node(d, "pressure", p["pressure"][2 * smoking + proteins])
        _node(d, "family", p["family"][mental_work])


def tomography(d):
    system, y = d["system"], d["counts"]
    activity = positive("activity", jnp.full(system.shape[1], y.sum() / system.shape[1]))
    with numpyro.plate("bins", len(y)):
        numpyro.sample("y", dist.Poisson((system * activity).sum(1) + 0.0), obs=y)


def dawid_skene(d):
    classes, raters, items = 4, 5, 45
    prevalence = simplex("prevalence", jnp.full(classes, 1 / classes))
    confusion = simplex("confusion", jnp.tile(0.6 * jnp.eye(classes) + 0.4 / classes, (raters, 1, 1)))
    counts = jnp.zeros((items, raters, classes)).at[d["item"], d["rater"], d["label"]].add(1.0)
    with numpyro.plate("items", items):
        z = numpyro.sample("z", dist.Categorical(prevalence))
        # the log-likelihood of all labels of an item, given its true class
        table = jnp.einsum("irl,rjl->ij", counts, jnp.log(jnp.maximum(confusion, 1e-300)))
        numpyro.factor("labels", table[jnp.arange(items), z])


def gamma_mixture(d):
    x = d["waiting"]
    pi = simplex("pi", jnp.array([0.4, 0.6]))
    shape = positive("shape", jnp.array([20.0, 20.0]))
    rate = positive("rate", shape / jnp.quantile(x, jnp.array([0.25, 0.8])))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("x", dist.Gamma(shape[z], rate[z]), obs=x)


def word_alignment(d):
    """IBM model 1: each target word picks a source word of its sentence uniformly and is drawn from that row of `t`."""
    source, target = jnp.stack([d["source_0"], d["source_1"]], -1), d["target"]  # -1 pads a short sentence
    t = simplex("t", jnp.full((4, 4), 1 / 4))
    ok = source >= 0
    with numpyro.plate("target_words", len(target)):
        a = numpyro.sample("a", dist.Categorical(ok / ok.sum(1, keepdims=True)))
        word = source[jnp.arange(len(target)), a]
        numpyro.factor("word", jnp.where(word >= 0, jnp.log(jnp.maximum(t[word, target], 1e-300)), NEVER))


def latent_classes(columns, k):
    def model(d):
        y = jnp.stack([d[c] for c in columns], -1)
        n, items = y.shape
        pi = simplex("pi", jnp.full(k, 1 / k))
        theta = probability("theta", jnp.linspace(0.2, 0.8, k)[:, None] * jnp.ones(items))
        with numpyro.plate("rows", n):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("y", dist.Bernoulli(theta[z]).to_event(1), obs=y)

    return model


def two_lines(d):
    x, y = d["stretchratio"], d["tuned"]
    pi = simplex("pi", jnp.array([0.5, 0.5]))
    beta = numpyro.param("beta", jnp.array([[y.mean(), 0.0], [0.0, 1.0]]))
    sd = positive("sd", jnp.full(2, y.std()))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("y", dist.Normal(beta[z, 0] + beta[z, 1] * x, sd[z]), obs=y)


def motif(d):
    """One site in each sequence: letters within it come from the columns of `pwm`, all others from `bg`."""
    letters, width = d["sequences"], 16  # letters 0..3 are A, C, G, T
    n, length = letters.shape
    places = length - width + 1
    pwm, bg = simplex("pwm", jnp.full((width, 4), 0.25)), simplex("bg", jnp.full(4, 0.25))
    prior = jnp.full(places, 1 / places)
    log_pwm, log_bg = jnp.log(jnp.maximum(pwm, 1e-300)), jnp.log(bg)
    # table[i, q] = log P(sequence i | its site starts at q)
    inside = [letters[:, k : k + places] for k in range(width)]
    table = sum(log_pwm[k][inside[k]] - log_bg[inside[k]] for k in range(width))
    table = table + log_bg[letters].sum(1, keepdims=True)
    with numpyro.plate("sequences", n):
        site = numpyro.sample("site", dist.Categorical(prior))
        numpyro.factor("letters", table[jnp.arange(n), site])


def multinomial_mixture(d):
    counts, k = d["counts"], 3
    n, species = counts.shape
    pi = simplex("pi", jnp.full(k, 1 / k))
    theta = simplex("theta", jnp.full((k, species), 1 / species))  # the same for all: needs an uneven start
    with numpyro.plate("rows", n):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("counts", dist.Multinomial(counts.sum(1), jnp.maximum(theta[z], 1e-300)), obs=counts)


def naive_bayes(d):
    votes = jnp.stack([d[f"v{j}"] for j in range(1, 17)], -1)
    seen = votes >= 0
    pi = simplex("pi", jnp.full(2, 0.5))
    theta = probability("theta", jnp.full((2, 16), 0.5))
    with numpyro.plate("rows", len(votes)):
        z = numpyro.sample("z", dist.Categorical(pi))
        known = d["label"] >= 0
        numpyro.factor("label", jnp.where(known & (z != d["label"]), NEVER, 0.0))
        numpyro.sample("y", dist.Bernoulli(theta[z]).mask(seen).to_event(1), obs=jnp.where(seen, votes, 0))


def record_linkage(d):
    agree = jnp.stack([d[c] for c in ["first_name", "last_name", "birth_month", "birth_day"]], -1)
    match = probability("match", 0.2)
    m = probability("m", jnp.full(4, 0.9))  # P(agree | same person)
    u = probability("u", jnp.full(4, 0.1))  # P(agree | different persons)
    with numpyro.plate("pairs", len(agree)):
        same = numpyro.sample("same", dist.Bernoulli(match))
        numpyro.sample("agree", dist.Bernoulli(jnp.stack([u, m])[same]).to_event(1), obs=agree)


def zero_inflated(columns):
    def model(d):
        x = jnp.stack([jnp.ones(len(d["y"])), *[d[c] for c in columns]], -1)
        beta = numpyro.param("beta", jnp.zeros(x.shape[1]))  # log mean of the Poisson part
        gamma = numpyro.param("gamma", jnp.zeros(x.shape[1]))  # logit of the extra zero
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=x @ gamma))
            rate = jnp.where(z == 1, 0.0, jnp.exp(x @ beta))
            numpyro.sample("y", dist.Poisson(jnp.maximum(rate, 1e-300)), obs=d["y"])

    return model
