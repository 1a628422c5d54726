"""The terms of the ELBO against torch.distributions, their units, the prior, and the VAE's shapes."""
import json
import math
import warnings

import mpmath
import pytest
import torch
from conftest import generator, randomised
from hybridvae.core import Draws, image_draws, load_model, project_root, save_model, to_float
from hybridvae.data import ImageData
from hybridvae.priors import StandardNormal
from hybridvae.training import TrainConfig, train
from hybridvae.vae import VAE, active_units, discretised_log_prob, kl_divergence, kl_per_dimension, reparameterize
from safetensors import safe_open
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


def test_the_kl_by_dimension_is_that_of_torch_distributions_and_sums_to_the_whole():
    mu, logvar = (v.double() for v in codes())
    found = kl_per_dimension(mu, logvar)
    torch.testing.assert_close(found, oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)), rtol=1e-10, atol=0)
    assert torch.equal(found.sum(dim=1), kl_divergence(mu, logvar))


def test_a_number_is_active_where_its_mean_varies_over_images():
    mu = torch.zeros(3, 4)
    mu[:, 1] = torch.tensor([0.0, 0.099, 0.198])  # unbiased variance just below 0.01
    mu[:, 2], mu[:, 3] = torch.tensor([0.0, 0.101, 0.202]), torch.tensor([5.0, 5.0, 5.0])
    assert active_units(mu) == 1 and active_units(10 * mu) == 2


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
            "kl_per_image": kl, "kl": kl / dimensions, "posterior_variance": posterior(mu, logvar).variance.mean(),
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


LEARNED = [{"prior": "FlowPrior", "kind": "realnvp", "layers": 2, "hidden": 8},
           {"prior": "FlowPrior", "kind": "maf", "layers": 2, "hidden": 8},
           {"prior": "MoGPrior", "components": 3}, {"prior": "VampPrior", "components": 3}]


@pytest.mark.parametrize("prior", LEARNED, ids=lambda p: p.get("kind", p["prior"]))
def test_a_learned_priors_kl_is_the_difference_of_log_densities_at_the_code_that_is_decoded(prior):
    vae, x = randomised(VAE(**SMALL, prior=prior)), images()
    terms = vae.training_loss(x, draws=Draws(0, 0))
    mu, logvar = vae.encode(x)
    z = mu + posterior(mu, logvar).stddev * Draws(0, 0).randn(len(x), 5)
    kl = (posterior(mu, logvar).log_prob(z).sum(dim=1) - vae.prior.log_prob(z)).mean()
    nll = -Normal(vae.decode(z), vae.sigma).log_prob(x).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(terms["kl_per_image"], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["loss"] * 768, nll + kl, rtol=1e-4, atol=1e-3)
    assert ("log_det" in terms) == (prior["prior"] == "FlowPrior")
    assert "log_det" not in vae.train().training_loss(x, draws=Draws(0, 0))
    if "log_det" in terms:
        torch.testing.assert_close(terms["log_det"], vae.prior.to_noise(z)[1].abs().mean() / 5)


def test_the_estimate_with_a_new_flow_is_the_closed_form_on_average():
    vae, x = VAE(**SMALL, prior=LEARNED[0]).eval(), images()
    mu, logvar = (v.repeat(5_000, 1) for v in vae.encode(x))
    eps = torch.randn(mu.shape, generator=generator(3))
    with torch.no_grad():
        found = vae.terms_of(x[:1].expand(len(mu), -1, -1, -1), x[:1], mu, logvar, eps)["kl"] * 768
    want = kl_divergence(*vae.encode(x)).mean()
    assert abs(found.mean() - want) < 4 * found.std() / math.sqrt(len(found)) and found.std() > 0.1


@pytest.mark.parametrize("prior", LEARNED, ids=lambda p: p.get("kind", p["prior"]))
def test_a_learned_prior_is_trained_with_the_vae_and_saved_with_it(prior, tmp_path):
    vae = randomised(VAE(**SMALL, prior=prior))
    vae.training_loss(images(), draws=Draws(0, 0))["loss"].backward()
    reached = [name for name, p in vae.prior.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 0.7 * len(list(vae.prior.parameters())), reached  # parts of a MAF without inputs get none
    again = load_model(save_model(vae, tmp_path / "vae.safetensors"))
    torch.testing.assert_close(vae.sample(4, generator=generator()), again.sample(4, generator=generator()))
    assert again.config == vae.config and type(again.prior) is type(vae.prior)


def test_a_flow_that_diverges_ends_the_training_and_says_so(tmp_path):
    pixels = torch.randint(256, (64, 16, 16, 3), generator=generator()).to(torch.uint8)
    data = ImageData("noise", "train", pixels.numpy())
    config = TrainConfig(kimg=1.6, batch_size=16, n_slices=1, lr=1e-4)

    def run(folder, log_scale):
        vae = VAE(**SMALL, prior=LEARNED[0])
        vae.prior.transform._transforms[0].log_scale.data.fill_(log_scale)
        return train(vae, data, config, tmp_path / folder, heldout=data, progress=False, cpu=True)
    assert run("sound", 1.0).stopped is None
    result = run("diverged", -12.0)
    assert result.step < config.steps and "flow has diverged" in result.stopped and "log_det" not in result.stopped


def test_a_posterior_wider_than_the_prior_is_warned_of():
    vae = VAE(**SMALL)
    points = [{"kimg": k, "posterior_variance": v} for k, v in ((1.0, 1.1), (2.0, 1.7), (3.0, 1.8))]
    with pytest.warns(UserWarning, match="mean variance has grown to 1.7"):
        assert vae.stop_reason(points[:2]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once, and not of a code without information
        assert all(vae.stop_reason(history) is None for history in ([], points[:1], points, [{"kimg": 1.0}]))


def test_the_elbo_of_a_record_is_that_of_the_vaes_own_prior():
    x = torch.randint(256, (50, 16, 16, 3), generator=generator()).to(torch.uint8)
    data, found = ImageData("noise", "train", x.numpy()), {}
    for name, prior in (("normal", None), ("flow", LEARNED[0])):
        torch.manual_seed(0)
        vae = randomised(VAE(**SMALL, prior=prior)) if prior is None else VAE(**SMALL, prior=prior)
        if prior:  # the same encoder and decoder, and a flow that is N(0, I) shifted by one
            vae.load_state_dict(randomised(VAE(**SMALL)).state_dict(), strict=False)
            vae.prior.transform._transforms[0].shift.data.fill_(-1.0)
        found[name] = vae.eval().measures(data, data)
        eps, (mu, logvar) = Draws(0, 0).randn(50, 5), vae.encode(to_float(x))
        z = mu + (logvar / 2).exp() * eps
        log_prior = Normal(1.0 if prior else 0.0, 1.0).log_prob(z).sum(dim=1)
        likelihood = Normal(vae.decode(z), vae.sigma).log_prob(to_float(x)).sum(dim=(1, 2, 3))
        q = posterior(mu, logvar)
        kl = (q.log_prob(z) if prior else oracle_kl(q, Normal(0.0, 1.0))).sum(dim=1) - (log_prior if prior else 0)
        assert found[name]["heldout_elbo"] == pytest.approx((likelihood - kl).mean().item(), rel=1e-4)
        assert found[name]["heldout_kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["flow"]["kl_per_code_dimension"] == pytest.approx(found["normal"]["kl_per_code_dimension"], rel=1e-4)


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


# --- spatial codes --------------------------------------------------------------------------------------------------

PLACE = dict(image_size=32, z_channels=3, width=8, multipliers=(1, 2), patch=2)  # codes of 3 x 8 x 8


@pytest.mark.parametrize("size, channels, patch, multipliers, side", [
    (16, 3, 2, (1, 2), 4), (32, 1, 1, (1, 2, 2), 8), (24, 2, 4, (1,), 6), (32, 3, 2, (1, 1, 1, 1), 2)])
def test_a_code_with_a_place_has_the_resolution_of_the_last_level(size, channels, patch, multipliers, side):
    shape = dict(image_size=size, channels=channels, patch=patch, multipliers=multipliers)
    vae = randomised(VAE(z_channels=3, z_dim=7, width=8, **shape))
    x = images(2, size, channels)
    mu, logvar = vae.encode(x)
    assert vae.code_shape == (3, side, side) and vae.z_dim == vae.config["z_dim"] == 3 * side**2
    assert mu.shape == logvar.shape == (2, vae.z_dim) and vae.decode(mu).shape == vae.reconstruct(x).shape == x.shape
    assert vae.sample(3, generator=generator()).shape == (3, channels, size, size)


def test_a_vector_code_has_the_length_asked_for_and_no_place():
    vae = VAE(**SMALL)
    assert vae.code_shape == (5,) and vae.z_dim == 5
    assert "z_channels" not in vae.config  # runs begun before there were spatial codes go on


def without_norm(vae):
    "The VAE without group normalisation, whose averages reach from every place to every other."
    for module in vae.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return vae.double()


def nearby(row, column, shape, reach, scale):
    "Which pixels lie within so many of those that the place (row, column) covers."
    rows, columns = (torch.arange(n) for n in shape)
    far = lambda at, pixels: torch.maximum(scale * at - pixels, pixels - (scale * at + scale - 1)).clamp(min=0)
    return (far(row, rows)[:, None] <= reach) & (far(column, columns)[None] <= reach)


def test_one_place_of_a_code_moves_the_pixels_around_it_and_no_others():
    vae = without_norm(randomised(VAE(**PLACE)))
    z = torch.randn(6, *vae.code_shape, generator=generator(), dtype=torch.float64)
    # first convolution and residual block at 8 x 8: 3 places; convolution and block at 16 x 16: 3; the last
    # convolution: 1; each of these pixels is 2 wide
    reach = (3 * 2 + 3 + 1) * 2
    for row, column in ((0, 0), (1, 6), (7, 7)):
        other = z.clone()
        other[:, :, row, column] += 1
        moved = ((vae.decode(z.flatten(1)) - vae.decode(other.flatten(1))).abs() > 0).any(dim=0).any(dim=0)
        near = nearby(row, column, moved.shape, reach, 4)
        assert not near.all() and not (moved & ~near).any()  # nothing outside
        assert (moved & near).sum() > 0.9 * near.sum()  # and about all that is inside


def test_one_number_of_a_vector_moves_every_pixel():
    vae = without_norm(randomised(VAE(**SMALL)))
    z = torch.randn(6, 5, generator=generator(), dtype=torch.float64)
    for k in range(5):
        other = z.clone()
        other[:, k] += 1
        assert ((vae.decode(z) - vae.decode(other)).abs() > 0).any(dim=0).all()


def test_what_an_image_shows_in_one_corner_is_written_in_that_corner_of_the_code():
    vae, x = without_norm(randomised(VAE(**PLACE))), images(4, 32).double()
    other = x.clone()
    other[:, :, :4, 28:] *= -1
    for a, b in zip(vae.encode(x), vae.encode(other)):
        moved = ((a - b).reshape(4, *vae.code_shape).abs() > 0).any(dim=0).any(dim=0)
        # one pixel of a code sees at most 1 + 2 (of 16 x 16: patch, block) + 1 (halving) pixels of 2, and block and
        # convolution at 8 x 8: 3 places
        assert moved[0, 7] and not moved[6:].any() and not moved[:, :2].any()


def test_with_normalisation_the_change_is_still_largest_around_the_place():
    vae = VAE(**PLACE).eval()
    z = torch.randn(32, *vae.code_shape, generator=generator())
    other = z.clone()
    other[:, :, 2, 5] += 1
    with torch.no_grad():
        change = (vae.decode(z.flatten(1)) - vae.decode(other.flatten(1))).abs().mean(dim=(0, 1))
    near, far = nearby(2, 5, change.shape, 4, 4), ~nearby(2, 5, change.shape, 14, 4)
    assert near.flatten()[change.argmax()] and change[near].mean() > 5 * change[far].mean() > 0


def test_a_code_with_a_place_has_the_same_loss_as_a_vector_and_trains_every_weight():
    vae, x = randomised(VAE(**PLACE), scale=0.1), images(4, 32)
    terms, dimensions = vae.training_loss(x, draws=Draws(0, 0)), 3 * 32 * 32
    mu, logvar = vae.encode(x)
    z = mu + posterior(mu, logvar).stddev * Draws(0, 0).randn(4, 192)
    nll = -Normal(vae.decode(z), vae.sigma).log_prob(x).sum(dim=(1, 2, 3)).mean()
    kl = oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(terms["loss"] * dimensions, nll + kl, rtol=1e-5, atol=1e-2)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


@pytest.mark.parametrize("prior", [None, LEARNED[0], LEARNED[3]], ids=["normal", "flow", "vamp"])
def test_a_vae_whose_code_has_a_place_comes_back_from_its_file(prior, tmp_path):
    vae = VAE(**PLACE, prior=prior).eval()
    again = load_model(save_model(vae, tmp_path / "vae.safetensors"))
    assert again.config == vae.config == json.loads(json.dumps(vae.config)) and again.config["z_channels"] == 3
    assert again.code_shape == vae.code_shape == (3, 8, 8)
    torch.testing.assert_close(vae.sample(4, generator=generator()), again.sample(4, generator=generator()))


def test_weights_from_before_there_were_places_still_load():
    path = project_root() / "weights" / "scenes-diffusevae.safetensors"
    with safe_open(path, "pt") as file:
        assert "z_channels" not in json.dumps(file.metadata())
    vae = load_model(path).vae
    assert vae.code_shape == (vae.z_dim,) and vae.sample(2, generator=generator()).isfinite().all()


@pytest.mark.parametrize("size, patch, multipliers", [(30, 2, (1, 2, 4)), (16, 3, (1, 2))])
def test_a_place_needs_a_size_that_divides_too(size, patch, multipliers):
    words = f"image_size {size} does not divide by patch {patch} and {len(multipliers) - 1} halvings"
    with pytest.raises(ValueError, match=words):
        VAE(image_size=size, patch=patch, multipliers=multipliers, z_channels=2)


def test_a_record_counts_the_kl_of_a_code_with_a_place_by_channel():
    vae = randomised(VAE(**PLACE), scale=0.1)
    pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8, generator=generator())
    vae.encoder.net[-2].weight.data[[1, 4]] = 0  # channel 1: its posterior is the prior
    vae.encoder.net[-2].bias.data[[1, 4]] = 0
    found = vae.measures(None, ImageData("noise", "test", pixels.numpy()))
    mu, logvar = vae.encode(to_float(pixels))
    want = oracle_kl(posterior(mu, logvar), Normal(0.0, 1.0)).mean(dim=0).reshape(3, 64).sum(dim=1)
    torch.testing.assert_close(torch.tensor(found["kl_per_code_channel"]), want, rtol=1e-4, atol=1e-6)
    assert want[1] == 0 and want[0] > 0.1 and "kl_per_code_dimension" not in found
    assert sum(found["kl_per_code_channel"]) == pytest.approx(found["heldout_kl"], rel=1e-4)


# --- likelihood -----------------------------------------------------------------------------------------------------

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.5, 2.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.4999, 1.0, 1.01])
def test_the_masses_of_all_levels_sum_to_one_and_are_differences_of_the_distribution_function(mean, sigma):
    mass = discretised_log_prob(LEVELS, torch.full_like(LEVELS, mean), sigma).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-12)
    ends = torch.tensor([-math.inf, math.inf])
    edges = torch.cat([ends[:1], (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1, ends[1:]])
    want = Normal(torch.tensor(mean, dtype=torch.float64), sigma).cdf(edges).diff()
    torch.testing.assert_close(mass, want, rtol=1e-9, atol=1e-15)


def test_a_level_far_from_the_mean_keeps_its_digits():
    "Against arithmetic with 60 digits: there the mass itself would be zero in double precision."
    mpmath.mp.dps = 60
    ends = ((255, -0.9, 0.006), (0, 0.9, 0.006), (0, -1.2, 0.01), (255, 1.2, 0.01))
    for x, mean, sigma in ((40, 0.7, 0.01), (200, -0.7, 0.01), *ends):
        low, high = (((mpmath.mpf(x) + side) / mpmath.mpf("127.5") - 1 - mean) / sigma for side in (-0.5, 0.5))
        low, high = (-mpmath.inf if x == 0 else low), (mpmath.inf if x == 255 else high)
        low, high = (-high, -low) if x / 127.5 - 1 > mean else (low, high)  # the tail on the left
        want = mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low))
        found = discretised_log_prob(LEVELS[x], torch.tensor(mean, dtype=torch.float64), sigma).item()
        assert found == pytest.approx(float(want), rel=1e-9, abs=1e-12)


def pixels(n=6, size=16):
    return torch.randint(256, (n, 3, size, size), generator=generator(4)) / 127.5 - 1


def test_the_bound_is_the_negative_elbo_of_whole_levels_for_each_prior():
    vae, x = randomised(VAE(**SMALL, sigma=1.0)), pixels()
    other = randomised(VAE(**SMALL, prior={"prior": "MoGPrior", "components": 3})).prior
    found = vae.likelihood_bound(x, image_draws(3, 0, 6), (None, other))
    with torch.no_grad():
        mu, logvar = vae.encode(x)
        z = reparameterize(mu, logvar, image_draws(3, 0, 6).randn(6, 5))
        x_hat, q = vae.decode(z), posterior(mu, logvar)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=other.logits),
            torch.distributions.Independent(Normal(other.means, other.log_scales.exp()), 1))
        kl = torch.stack([oracle_kl(q, Normal(0.0, 1.0)).sum(dim=1), q.log_prob(z).sum(dim=1) - mixture.log_prob(z)])
        low, high = ((x.double() + side / 255) for side in (-1, 1))
        low[x == -1], high[x == 1] = -math.inf, math.inf
        p = Normal(x_hat.double(), vae.sigma)
        nll = -(p.cdf(high) - p.cdf(low)).log().flatten(1).sum(dim=1)
    assert set(found) == {"kl", "reconstruction"} and found["kl"].shape == (2, 6)
    torch.testing.assert_close(found["kl"], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["reconstruction"], nll, rtol=1e-6, atol=0)


def test_the_mean_bound_lies_above_the_likelihood_that_many_draws_of_the_prior_give():
    "log P(x) by the mean of P(x|z) over z ~ p(z), which needs no encoder; with a wide decoder the mean settles."
    vae, x = randomised(VAE(**SMALL | {"z_dim": 2}, sigma=2.0)), pixels(4)
    with torch.no_grad():
        parts = [vae.likelihood_bound(x, image_draws(seed, 0, 4)) for seed in range(50)]
        bound = torch.stack([part["kl"][0] + part["reconstruction"] for part in parts]).mean(dim=0)
        drawn = vae.decode(vae.prior.sample(2_000, generator(1)))
        log_p = torch.stack([discretised_log_prob(image[None], drawn, 2.0).flatten(1).sum(dim=1) for image in x], dim=1)
        nll = math.log(2_000) - log_p.logsumexp(dim=0)
    assert (bound > nll).all() and (bound < nll + 0.1 * 768).all(), (bound, nll)


def test_the_bound_of_an_image_is_the_same_in_every_batch():
    vae, x = randomised(VAE(**SMALL)), pixels()
    whole = vae.likelihood_bound(x, image_draws(0, 0, 6))
    parts = [vae.likelihood_bound(x[a:b], image_draws(0, a, b)) for a, b in ((0, 1), (1, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts], dim=-1), value, rtol=1e-5, atol=1e-4)
