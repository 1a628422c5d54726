"""The terms of the ELBO against torch.distributions, their units, the prior, and the VAE's shapes."""
import math

import pytest
import torch
from conftest import generator, randomised
from hybridvae.core import Draws, to_float
from hybridvae.data import ImageData
from hybridvae.priors import StandardNormal
from hybridvae.vae import VAE, kl_divergence, reparameterize
from torch.distributions import MultivariateNormal, Normal, kl_divergence as oracle_kl

SMALL = dict(image_size=16, z_dim=5, width=8, multipliers=(1, 2))


def codes(n=6, dim=5):
    g = generator()
    return torch.randn(n, dim, generator=g), 1.5 * torch.randn(n, dim, generator=g)


def images(n=4, size=16, channels=3):
    return torch.rand(n, channels, size, size, generator=generator(1)) * 2 - 1


def posterior(mu, logvar):
    return Normal(mu, logvar.exp().sqrt())


# --- terms ----------------------------------------------------------------------------------------------------------

def test_the_kl_is_that_of_torch_distributions():
    mu, logvar = (v.double() for v in codes())
    want = oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(kl_divergence(mu, logvar), want, rtol=1e-10, atol=0)


def test_the_kl_is_zero_at_the_prior_only():
    zero = torch.zeros(1, 5)
    assert kl_divergence(zero, zero).item() == 0
    assert all(kl_divergence(zero + a, zero + b).item() > 0 for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)))


def test_reparameterized_codes_have_the_mean_and_deviation_of_the_posterior():
    mu, logvar = (v.double() for v in codes())
    eps = torch.randn(mu.shape, generator=generator(2), dtype=torch.float64)
    z = reparameterize(mu, logvar, eps)
    torch.testing.assert_close((z - mu) / posterior(mu, logvar).stddev, eps)
    # the same quantile of q(z|x) as eps is of N(0, 1)
    torch.testing.assert_close(posterior(mu, logvar).cdf(z), Normal(0.0, 1.0).cdf(eps))


def test_gradients_reach_mu_and_logvar():
    mu, logvar = (v.double().requires_grad_() for v in codes())
    eps = torch.randn(mu.shape, generator=generator(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, v: reparameterize(m, v, eps), (mu, logvar))
    grad_mu, grad_logvar = torch.autograd.grad(reparameterize(mu, logvar, eps).sum(), (mu, logvar))
    assert (grad_mu == 1).all() and (grad_logvar.abs() > 0).all()


@pytest.mark.parametrize("sigma, beta", [(0.2, 1.0), (1.0, 0.1), (0.05, 4.0)])
def test_the_loss_is_the_elbo_of_torch_distributions_with_the_kl_weighted(sigma, beta):
    vae, x = randomised(VAE(**SMALL, sigma=sigma, beta=beta)), images()
    terms = vae.training_loss(x, draws=Draws(0, 0))
    mu, logvar = vae.encode(x)
    z = mu + posterior(mu, logvar).stddev * Draws(0, 0).randn(len(x), 5)
    nll = -Normal(vae.decode(z), sigma).log_prob(x).sum(dim=(1, 2, 3)).mean()  # nats per image
    kl = oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)).sum(dim=1).mean()
    dimensions = 3 * 16 * 16
    want = {"reconstruction_per_image": nll, "reconstruction": nll / dimensions,
            "kl_per_image": kl, "kl": kl / dimensions,
            "loss": (nll + beta * kl) / dimensions, "mse": (x - vae.decode(z)).square().mean()}
    assert kl > 0.1 and terms.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_terms_of_each_image_average_to_the_loss():
    vae, x = randomised(VAE(**SMALL)), images()
    apart = vae.elbo_terms(x, Draws(0, 0).randn(4, 5))
    together = vae.training_loss(x, draws=Draws(0, 0))
    for name, value in apart.items():
        assert value.shape == (4,)
        torch.testing.assert_close(value.mean(), together[name])


def test_draws_decide_the_loss():
    vae, x = randomised(VAE(**SMALL)), images()
    first, again, other = (vae.training_loss(x, draws=Draws(0, step))["loss"] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- prior ----------------------------------------------------------------------------------------------------------

def test_the_prior_is_the_standard_normal():
    z = torch.randn(7, 5, generator=generator(), dtype=torch.float64)
    want = MultivariateNormal(torch.zeros(5).double(), torch.eye(5).double()).log_prob(z)
    torch.testing.assert_close(StandardNormal(5).log_prob(z), want)


def test_draws_from_the_prior_follow_the_generator_and_its_moments():
    prior, n = StandardNormal(3), 20_000
    z = prior.sample(n, generator(4))
    assert z.shape == (n, 3) and torch.equal(z, prior.sample(n, generator(4)))
    assert not torch.equal(z, prior.sample(n, generator(5)))
    assert (z.mean(dim=0).abs() < 5 / math.sqrt(n)).all()
    assert ((z.T.cov() - torch.eye(3)).abs() < 5 * math.sqrt(2 / n)).all()


# --- the model ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, channels, patch, multipliers, blocks", [
    (16, 3, 2, (1, 2), 1), (32, 3, 2, (1, 2, 4), 2), (16, 1, 1, (1, 2, 2), 1), (24, 2, 4, (1,), 1)])
def test_images_and_codes_have_the_shapes_asked_for(size, channels, patch, multipliers, blocks):
    shape = dict(image_size=size, channels=channels, patch=patch, multipliers=multipliers, blocks=blocks)
    vae = randomised(VAE(z_dim=5, width=8, **shape))
    x = images(2, size, channels)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (2, 5) and vae.decode(mu).shape == vae.reconstruct(x).shape == x.shape
    assert vae.sample(3, generator=generator()).shape == (3, channels, size, size)


@pytest.mark.parametrize("size, patch, multipliers", [(30, 2, (1, 2, 4)), (16, 3, (1, 2)), (17, 1, (1, 2))])
def test_an_image_size_that_does_not_divide_is_refused(size, patch, multipliers):
    with pytest.raises(ValueError, match=f"image_size {size} does not divide by patch {patch}"):
        VAE(image_size=size, patch=patch, multipliers=multipliers)


def test_every_pixel_reaches_the_code_and_every_code_the_image():
    vae, x = randomised(VAE(**SMALL)), images(1).requires_grad_()
    for k in range(5):
        for part in vae.encode(x):
            assert (torch.autograd.grad(part[0, k], x, retain_graph=True)[0] != 0).all()
    z = torch.zeros(1, 5, requires_grad=True)
    assert (torch.autograd.grad(vae.decode(z).square().sum(), z)[0] != 0).all()


def test_samples_are_decoded_draws_from_the_prior_within_the_range():
    vae = randomised(VAE(**SMALL), scale=0.5)
    sample = vae.sample(8, generator=generator(3))
    decoded = vae.decode(StandardNormal(5).sample(8, generator(3)))
    assert decoded.abs().max() > 1 and torch.equal(sample, decoded.clamp(-1, 1))
    assert torch.equal(sample, vae.sample(8, sampler="dpmpp", steps=7, generator=generator(3)))  # one shot


def test_reconstructions_come_from_the_mean():
    vae, x = randomised(VAE(**SMALL)), images()
    assert torch.equal(vae.reconstruct(x), vae.decode(vae.encode(x)[0])) and not vae.reconstruct(x).requires_grad


def test_a_record_says_how_well_held_out_images_come_back_and_how_much_of_the_code_is_used():
    vae = randomised(VAE(**SMALL))
    vae.encoder.net[-1].weight.data[:2] = 0  # two numbers of the code say nothing about the image
    vae.encoder.net[-1].bias.data[5] = 0.0
    vae.encoder.net[-1].bias.data[0] = 0.0
    vae.encoder.net[-1].weight.data[5] = 0  # and the first one's posterior is the prior
    pixels = torch.randint(256, (20, 16, 16, 3), dtype=torch.uint8, generator=generator())
    test = ImageData("noise", "test", pixels.numpy())
    found, x = vae.measures(None, test), to_float(pixels)
    mu, logvar = vae.encode(x)
    want = oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)).mean(dim=0)
    torch.testing.assert_close(torch.tensor(found["kl_per_code_dimension"]), want, rtol=1e-4, atol=1e-6)
    assert want[0] == 0 and want[1:].min() > 0.01 and found["active_units"] == 3
    assert found["heldout_reconstruction_mse"] == pytest.approx((vae.reconstruct(x) - x).square().mean().item())


def test_extreme_log_variances_stay_finite():
    vae = VAE(**SMALL)
    vae.encoder.net[-1].bias.data[5:] = torch.tensor([1e6, -1e6, 0, 0, 0])
    terms = vae.training_loss(images(), draws=Draws(0, 0))
    assert all(v.isfinite() for v in terms.values())


def test_a_config_builds_the_same_architecture():
    vae = VAE(**SMALL, sigma=0.3, beta=2.0)
    again = VAE.from_config(vae.config)
    assert again.config == vae.config and (again.sigma, again.beta) == (0.3, 2.0)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
