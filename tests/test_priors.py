"""Priors: densities against torch.distributions, samples against densities, and mixtures fitted to codes."""
import math

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.priors import GaussianMixture, StandardNormal, fit_mixture
from hybridvae.vae import VAE
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal


def mixture(components=3, dim=4, seed=0, spread=2.0):
    "A mixture with random weights, means and full covariances."
    g = generator(seed)
    roots = torch.randn(components, dim, dim, generator=g, dtype=torch.float64)
    covariances = roots @ roots.mT / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(components, generator=g, dtype=torch.float64) + 0.2
    means = spread * torch.randn(components, dim, generator=g, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def oracle(prior):
    "The same distribution by torch.distributions."
    if isinstance(prior, StandardNormal):
        return MultivariateNormal(torch.zeros(prior.dim), torch.eye(prior.dim))
    return MixtureSameFamily(Categorical(prior.weights), MultivariateNormal(prior.means, scale_tril=prior.roots))


PRIORS = {"normal": lambda: StandardNormal(4), "mixture": mixture, "one component": lambda: mixture(1),
          "one dimension": lambda: mixture(3, 1)}
every_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS)


@every_prior
def test_log_densities_are_those_of_torch_distributions(make):
    prior = make()
    z = 3 * torch.randn(200, prior.dim, generator=generator(1))
    found = prior.log_prob(z)
    assert found.shape == (200,) and prior.config["dim"] == prior.dim
    torch.testing.assert_close(found, oracle(prior).log_prob(z), rtol=1e-4, atol=1e-4)


def test_a_point_far_from_every_component_has_a_finite_log_density():
    z = torch.full((1, 4), 50.0)
    assert torch.isfinite(mixture().log_prob(z)).all() and mixture().log_prob(z) < -100


@every_prior
def test_samples_have_the_mean_and_covariance_of_the_distribution(make):
    prior, n = make(), 100_000
    z = prior.sample(n, generator(2)).double()
    want = oracle(prior)
    if isinstance(prior, GaussianMixture):
        w, mu, root = prior.weights.double(), prior.means.double(), prior.roots.double()
        mean = w @ mu
        centred = mu - mean
        covariance = torch.einsum("k,kij->ij", w, root @ root.mT) + torch.einsum("k,ki,kj->ij", w, centred, centred)
    else:
        mean, covariance = want.mean.double(), want.covariance_matrix.double()
    scale = covariance.diagonal().sqrt()
    assert ((z.mean(dim=0) - mean).abs() < 5 * scale / math.sqrt(n)).all()
    assert ((z.T.cov().reshape(covariance.shape) - covariance).abs() < 15 * scale.outer(scale) / math.sqrt(n)).all()


def test_components_are_drawn_as_often_as_their_weights_say():
    weights = torch.tensor([0.7, 0.1, 0.2])
    prior = GaussianMixture(weights, torch.tensor([[-100.0], [0.0], [100.0]]), torch.ones(3, 1, 1))
    which = (prior.sample(20_000, generator()) / 100).round().long() + 1
    assert (which.flatten().bincount() / 20_000 - weights).abs().max() < 0.02


@every_prior
def test_the_generator_decides_the_samples_and_where_they_lie(make):
    prior = make()
    draw = lambda seed: prior.sample(5, generator(seed))
    assert draw(0).shape == (5, prior.dim) and draw(0).device.type == "cpu" and draw(0).dtype == torch.float32
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    g = generator(0)
    assert torch.equal(prior.sample(5, g), draw(0)) and not torch.equal(prior.sample(5, g), draw(0))  # it goes on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_prior
def test_a_generator_on_a_gpu_gives_samples_there(make):
    assert make().sample(5, torch.Generator("cuda").manual_seed(0)).is_cuda


def test_a_mixture_comes_back_from_its_state():
    prior, other = mixture(seed=0), mixture(seed=1)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, 4, generator=generator())
    assert torch.equal(other.log_prob(z), prior.log_prob(z)) and not list(prior.parameters())


# --- fitting --------------------------------------------------------------------------------------------------------

def test_the_fit_finds_the_mixture_that_the_codes_were_drawn_from():
    weights, means = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    covariances = torch.stack([torch.eye(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 0.25 * torch.eye(2)])
    fit = fit_mixture(GaussianMixture(weights, means, covariances).sample(6_000, generator()), components=3)
    order = [(fit.means - m).norm(dim=1).argmin().item() for m in means]
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(fit.weights[order], weights, rtol=0, atol=0.03)
    torch.testing.assert_close(fit.means[order], means, rtol=0, atol=0.1)
    torch.testing.assert_close((fit.roots @ fit.roots.mT)[order], covariances, rtol=0, atol=0.12)


def test_the_fit_knows_held_out_codes_better_than_the_normal_prior():
    truth = mixture(5, 3, seed=3, spread=3.0)
    codes, held = truth.sample(2_000, generator(0)), truth.sample(1_000, generator(1))
    fitted, normal, best = (p.log_prob(held).mean() for p in (fit_mixture(codes, 5), StandardNormal(3), truth))
    assert best + 0.05 > fitted > best - 0.15 and fitted > normal + 1


def test_the_fit_follows_its_seed_and_leaves_the_global_generator_alone():
    codes = torch.randn(300, 3, generator=generator())
    state = torch.get_rng_state()
    a, b, c = (fit_mixture(codes, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.means, b.means) and not torch.equal(a.means, c.means)


def test_too_few_codes_are_refused():
    with complains("39 codes are too few", "4 components", "at least 40"):
        fit_mixture(torch.randn(39, 2), components=4)
    assert len(fit_mixture(torch.randn(40, 2, generator=generator()), components=4).means) == 4


# --- a VAE's codes --------------------------------------------------------------------------------------------------

def shapes(n):
    factors = shapes_factors(np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, 16), factors)


@pytest.fixture
def vae():
    return randomised(VAE(image_size=16, z_dim=4, width=8, multipliers=(1, 2)), scale=0.3)


def test_codes_are_draws_from_the_posterior_of_the_first_images(vae):
    data = shapes(700)  # more than one batch
    codes = vae.codes(data, n=600)
    assert codes.shape == (600, 4) and codes.device.type == "cpu" and len(vae.codes(data)) == 700
    with torch.no_grad():
        mu, logvar = vae.encode(data.float()[:600])
    white = (codes - mu) / (0.5 * logvar).exp()
    assert white.mean(dim=0).abs().max() < 5 / math.sqrt(600) and (white.std(dim=0) - 1).abs().max() < 0.15
    assert torch.equal(codes, vae.codes(data, n=600)) and not torch.equal(codes, vae.codes(data, n=600, seed=1))


def test_ex_pde_becomes_a_mixture_of_at_most_fifty_components_and_anything_else_stays(vae):
    assert vae.sampling_options({"sampler": "ddim", "steps": 3}, None) == {"sampler": "ddim", "steps": 3}
    for n, components in ((40, 4), (700, 50), (12, 1)):
        options = vae.sampling_options({"prior": "ex-pde", "steps": 3}, shapes(n))
        assert options["steps"] == 3 and len(options["prior"].means) == components
    x = vae.sample(6, generator=generator(), prior=options["prior"])
    assert x.shape == (6, 3, 16, 16) and torch.equal(x, vae.sample(6, generator=generator(), prior=options["prior"]))
    assert not torch.equal(x, vae.sample(6, generator=generator()))
    with complains("9 codes are too few"):
        vae.sampling_options({"prior": "ex-pde"}, shapes(9))
