"""Priors: densities against torch.distributions and autograd, samples against densities, fits, and what is caught."""
import copy
import gc
import json
import math
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae import priors
from hybridvae.core import MODELS, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.priors import (
    PRIORS as CLASSES, FlowPrior, GaussianMixture, MoGPrior, StandardNormal, VampPrior, build_prior, check_prior,
    fit_by_name, fit_mixture, fit_prior, kl_monte_carlo, two_sample_test)
from hybridvae.vae import VAE
from scipy.stats import chi2, norm
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence


def mixture(components=3, dim=4, seed=0, spread=2.0):
    "A mixture with random weights, means and full covariances."
    g = generator(seed)
    roots = torch.randn(components, dim, dim, generator=g, dtype=torch.float64)
    covariances = roots @ roots.mT / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(components, generator=g, dtype=torch.float64) + 0.2
    means = spread * torch.randn(components, dim, generator=g, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


class ToyEncoder(nn.Module):
    "Images of twelve pixels to mu and logvar in four dimensions."

    def __init__(self, seed=0):
        super().__init__()
        self.linear = randomised(nn.Linear(12, 8), 0.3, seed)

    def forward(self, x):
        return self.linear(x.flatten(1)).chunk(2, dim=1)


def vampprior(components=5, seed=0):
    "A VampPrior some of whose pixels lie beyond [-1, 1]."
    return randomised(VampPrior(4, (3, 2, 2), components), scale=1.0, seed=seed).bind(ToyEncoder())


def flow(kind="realnvp", dim=4, layers=4, scale=0.25, seed=0, **options):
    "A flow far from the N(0, I) as which a new one starts."
    torch.manual_seed(seed)
    return randomised(FlowPrior(dim, kind, layers, hidden=8, **options), scale, seed)


def components_of(prior):
    "Weights, means and roots of the covariances of any mixture, in float64 and by numpy where there is an encoder."
    if isinstance(prior, GaussianMixture):
        return [t.double() for t in (prior.weights, prior.means, prior.roots)]
    if isinstance(prior, MoGPrior):
        weights = prior.logits.exp() / prior.logits.exp().sum()
        return [t.detach().double() for t in (weights, prior.means, prior.log_scales.exp().diag_embed())]
    linear = prior._encode.linear
    pixels = np.clip(prior.pseudo_inputs.detach().double().numpy(), -1, 1).reshape(len(prior.pseudo_inputs), -1)
    out = pixels @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    mu, deviation = torch.from_numpy(out[:, :4]), torch.from_numpy(np.exp(out[:, 4:] / 2))
    return torch.full((len(mu),), 1 / len(mu)).double(), mu, deviation.diag_embed()


def oracle(prior):
    "The same distribution by torch.distributions."
    if isinstance(prior, StandardNormal):
        return MultivariateNormal(torch.zeros(prior.dim), torch.eye(prior.dim))
    weights, means, roots = components_of(prior)
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, scale_tril=roots))


KNOWN = {"normal": lambda: StandardNormal(4), "mixture": mixture, "one component": lambda: mixture(1),
         "one dimension": lambda: mixture(3, 1), "MoG": lambda: randomised(MoGPrior(4, 6), 0.7), "VampPrior": vampprior}
FLOWS = {"RealNVP": flow, "RealNVP of odd size": lambda: flow(dim=3, layers=5), "MAF": lambda: flow("maf"),
         "MAF in one dimension": lambda: flow("maf", dim=1, layers=2)}
PRIORS = KNOWN | FLOWS
LEARNED = {k: PRIORS[k] for k in ("MoG", "VampPrior", "RealNVP", "RealNVP of odd size", "MAF")}
every = lambda makers: pytest.mark.parametrize("make", makers.values(), ids=makers)
every_flow, every_learned = every(FLOWS), every(LEARNED)
every_prior, every_known = every(PRIORS), every(KNOWN)


@every_known
def test_log_densities_are_those_of_torch_distributions(make):
    prior = make()
    z = 3 * torch.randn(200, prior.dim, generator=generator(1))
    found = prior.log_prob(z)
    assert found.shape == (200,) and prior.config["dim"] == prior.dim
    want = oracle(prior).log_prob(z.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_a_point_far_from_every_component_has_a_finite_log_density():
    z = torch.full((1, 4), 50.0)
    assert torch.isfinite(mixture().log_prob(z)).all() and mixture().log_prob(z) < -100


@every_known
def test_samples_have_the_mean_and_covariance_of_the_distribution(make):
    prior, n = make(), 100_000
    z = prior.sample(n, generator(2)).double()
    want = oracle(prior)
    if not isinstance(prior, StandardNormal):
        w, mu, root = components_of(prior)
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
    assert not draw(0).requires_grad and prior.sample(3).shape == (3, prior.dim)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_prior
def test_a_generator_on_a_gpu_gives_samples_there(make):
    assert make().sample(5, torch.Generator("cuda").manual_seed(0)).is_cuda


def test_a_mixture_comes_back_from_its_state():
    prior, other = mixture(seed=0), mixture(seed=1)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, 4, generator=generator())
    assert torch.equal(other.log_prob(z), prior.log_prob(z)) and not list(prior.parameters())


@every_prior
def test_a_prior_comes_back_from_config_and_state(make):
    prior = make()
    torch.manual_seed(99)  # other permutations than the original's, until they are loaded
    other = build_prior(json.loads(json.dumps(prior.config)))
    assert type(other) is type(prior) and other.config == prior.config and type(prior).__name__ in CLASSES
    if isinstance(prior, VampPrior):
        other.bind(prior._encode)
    z = torch.randn(20, prior.dim, generator=generator())
    assert isinstance(prior, StandardNormal) or not torch.equal(other.log_prob(z), prior.log_prob(z))
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.log_prob(z), prior.log_prob(z))
    assert torch.equal(other.sample(5, generator()), prior.sample(5, generator()))


@every_prior
def test_gradients_in_z_are_those_of_finite_differences(make):
    prior = make().double()
    if isinstance(prior, VampPrior):
        prior.bind(ToyEncoder().double())
    z = torch.randn(3, prior.dim, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior.log_prob, z)


@every_learned
def test_gradients_reach_every_parameter(make):
    prior = make()
    prior.log_prob(torch.randn(50, prior.dim, generator=generator())).sum().backward()
    assert not [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_priors_that_cannot_be_built_are_refused():
    with complains("no prior class 'Glow'", "FlowPrior", "StandardNormal"):
        build_prior({"prior": "Glow", "dim": 2})
    with complains("no prior class None"):
        build_prior({"dim": 2})
    with complains("config of MoGPrior", "knots"):
        build_prior({"prior": "MoGPrior", "dim": 2, "knots": 3})
    with complains("config of GaussianMixture", "components"):
        build_prior({"prior": "GaussianMixture", "dim": 2})
    for arguments, said in (({"dim": 0}, "dim=0"), ({"layers": -1}, "layers=-1"), ({"bound": 0.0}, "bound=0.0"),
                            ({"kind": "glow"}, "'glow'"), ({"dim": 1}, "kind='maf'")):
        with complains(said):
            FlowPrior(**{"dim": 2} | arguments)


def test_a_flow_without_nflows_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nflows", None)
    with complains("pip install nflows"):
        FlowPrior(2)


# --- learned mixtures -----------------------------------------------------------------------------------------------

def test_a_new_mixture_is_spread_out_by_the_global_generator():
    torch.manual_seed(0)
    a, b = MoGPrior(8, 30), MoGPrior(8, 30)
    torch.manual_seed(0)
    assert torch.equal(MoGPrior(8, 30).means, a.means) and not torch.equal(a.means, b.means)
    assert torch.pdist(a.means).min() > 1 and abs(a.means.std() - 1) < 0.15


def test_a_mixture_that_shrinks_or_grows_without_bound_stays_finite():
    prior = MoGPrior(2, 2)
    for size in (-500.0, 500.0):
        nn.init.constant_(prior.log_scales, size)
        assert torch.isfinite(prior.log_prob(torch.randn(5, 2, generator=generator()))).all()
        assert torch.isfinite(prior.sample(5, generator())).all()


def test_pseudo_inputs_count_as_images_and_get_gradients_at_and_beyond_the_edge():
    prior = VampPrior(4, (3, 2, 2), 3).bind(ToyEncoder())
    assert prior.pseudo_inputs.abs().max() <= 1 and prior.pseudo_inputs.std() > 0.4
    nn.init.constant_(prior.pseudo_inputs, 1.0)  # white
    prior.pseudo_inputs.data[1], prior.pseudo_inputs.data[2] = -1.0, 7.0
    prior.log_prob(torch.randn(9, 4, generator=generator())).sum().backward()
    assert (prior.pseudo_inputs.grad.abs() > 0).all()
    mu, _ = prior.posteriors()
    assert torch.equal(mu[0], mu[2])  # 7 counts as 1


def test_pseudo_inputs_start_from_images():
    images, prior = torch.rand(40, 3, 2, 2, generator=generator()), VampPrior(4, (3, 2, 2), 10)
    prior.start_from_images(images, generator(1))
    rows = {tuple(x.flatten().tolist()) for x in prior.pseudo_inputs.detach()}
    assert len(rows) == 10 and rows <= {tuple(x.flatten().tolist()) for x in images}
    for bad in (images[:9], images.reshape(40, 3, 4, 1)):
        with complains("10 pseudo-inputs", tuple(bad.shape)):
            prior.start_from_images(bad)


def test_an_unbound_vampprior_says_so():
    with complains("bind(vae.encode)"):
        VampPrior(4, (3, 2, 2)).log_prob(torch.zeros(1, 4))


class VampVAE(VAE):
    "A VAE whose prior is the mean of its own posteriors."

    def __init__(self, **shape):
        super().__init__(**shape)
        self.config["model"] = "VampVAE"
        self.prior = VampPrior(self.z_dim, self.image_shape, 3).bind(self.encode)


MODELS.pop("VampVAE")  # other tests list the models


def vamp_vae():
    return randomised(VampVAE(image_size=16, z_dim=4, width=8, multipliers=(1, 2)), scale=0.3)


def test_a_vaes_encoder_is_registered_once_and_saved_once(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "VampVAE", VampVAE)
    model = vamp_vae()
    assert list(model.prior.state_dict()) == ["pseudo_inputs"] and list(model.prior.children()) == []
    assert set(model.state_dict()) == {*VAE(**vae_shape()).state_dict(), "prior.pseudo_inputs"}
    loaded, z = load_model(save_model(model, tmp_path / "vae.safetensors")), torch.randn(5, 4, generator=generator())
    torch.testing.assert_close(loaded.prior.log_prob(z), model.prior.log_prob(z))
    bound = VampPrior(4, (3, 16, 16)).bind(model.encoder)  # a module, too, stays outside
    assert list(bound.state_dict()) == ["pseudo_inputs"] and list(bound.children()) == []


def vae_shape():
    return dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))


def test_a_copied_vae_takes_its_prior_along():
    model, z = vamp_vae(), torch.randn(5, 4, generator=generator())
    before, twin = model.prior.log_prob(z), copy.deepcopy(model)
    randomised(twin.encoder, seed=5)
    assert torch.equal(model.prior.log_prob(z), before) and not torch.allclose(twin.prior.log_prob(z), before)
    model.prior.log_prob(z).sum().backward()
    assert model.encoder.net[0].weight.grad.abs().sum() > 0 and twin.encoder.net[0].weight.grad is None


# --- flows ----------------------------------------------------------------------------------------------------------

@every_flow
def test_the_log_determinant_is_that_of_autograds_jacobian(make):
    prior = make().double()
    for z in 2 * torch.randn(5, 1, prior.dim, generator=generator(), dtype=torch.float64):
        u, log_det = prior.to_noise(z)
        jacobian = torch.autograd.functional.jacobian(lambda z: prior.to_noise(z)[0], z)[0, :, 0]
        torch.testing.assert_close(log_det[0], jacobian.slogdet()[1])
        want = Normal(0, 1).log_prob(u).sum() + jacobian.slogdet()[1]
        torch.testing.assert_close(prior.log_prob(z)[0], want, check_dtype=False)
        assert abs(log_det) > 0.01


@pytest.mark.parametrize("kind, dim", [("realnvp", 2), ("maf", 2), ("maf", 1)])
def test_the_density_of_a_flow_integrates_to_one_and_its_samples_follow_it(kind, dim):
    prior, cells, fine = flow(kind, dim, layers=3, scale=0.3, seed=2), 4, 100
    z = prior.sample(4_000, generator())
    side = torch.linspace(-1, 1, cells * fine + 1)[:-1] + 1 / (cells * fine)
    half, centre = 2.5 * (z - z.mean(dim=0)).abs().amax(dim=0), z.mean(dim=0)  # a box with all of the mass
    grid = torch.cartesian_prod(*[side] * dim).reshape(-1, dim) * half + centre
    with torch.no_grad():
        mass = prior.log_prob(grid).double().exp() * (2 * half / len(side)).prod()
    assert abs(mass.sum() - 1) < 0.01
    place = lambda points: ((points - centre) / (0.2 * half) + 2).floor().clamp(0, cells - 1).long()
    cell = lambda points: place(points) @ cells ** torch.arange(dim)
    want = torch.zeros(cells**dim, dtype=torch.float64).index_add(0, cell(grid), mass) * len(z)
    have = cell(z).bincount(minlength=cells**dim)
    often = want > 10
    statistic = ((have - want).square() / want)[often].sum()
    assert often.sum() >= 3 and want[often].sum() > 0.95 * len(z) and statistic < chi2.ppf(0.9999, int(often.sum()))


@every_flow
def test_the_inverse_undoes_the_flow(make):
    prior = make()
    z = torch.randn(200, prior.dim, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(prior.from_noise(prior.to_noise(z)[0]), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prior.to_noise(prior.from_noise(z))[0], z, rtol=1e-5, atol=1e-5)
    noise = torch.randn(7, prior.dim, generator=generator(3))
    torch.testing.assert_close(prior.to_noise(prior.sample(7, generator(3)))[0], noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["realnvp", "maf"])
def test_a_new_flow_is_the_standard_normal_and_can_leave_it(kind):
    prior, z = FlowPrior(5, kind), torch.randn(50, 5, generator=generator())
    torch.testing.assert_close(prior.log_prob(z), oracle(StandardNormal(5)).log_prob(z))
    prior.log_prob(z).sum().backward()
    assert any(p.grad.abs().sum() > 0 for name, p in prior.named_parameters() if "final_layer" in name)


@pytest.mark.parametrize("kind, layers", [("realnvp", 2), ("maf", 1)])
@pytest.mark.parametrize("dim", [2, 3, 6])
def test_every_dimension_is_transformed_whatever_the_permutation(kind, layers, dim):
    for seed in range(5):
        prior = flow(kind, dim, layers, seed=seed)
        nn.init.zeros_(prior.transform._transforms[0].log_scale)
        nn.init.zeros_(prior.transform._transforms[0].shift)
        z = torch.randn(50, dim, generator=generator())
        u = prior.to_noise(z)[0]
        assert (u[:, :, None] - z[:, None, :]).abs().amax(dim=0).min() > 1e-3  # no column has gone through untouched


@pytest.mark.parametrize("kind, transformed", [("realnvp", 3), ("maf", 6)])
def test_the_log_determinant_is_bounded_whatever_the_weights(kind, transformed):
    prior = flow(kind, 6, layers=4, scale=50.0, bound=1.5)
    nn.init.zeros_(prior.transform._transforms[0].log_scale)
    log_det = prior.to_noise(100 * torch.randn(500, 6, generator=generator()))[1].abs().max()
    assert 1.5 < log_det <= 1.5 * 4 * transformed + 1e-3


@pytest.mark.parametrize("kind", ["realnvp", "maf"])
def test_a_flow_starts_at_the_codes_mean_and_deviation(kind):
    normal = torch.randn(2_000, 3, generator=generator())
    codes = torch.tensor([3.0, -40.0, 0.0]) + torch.tensor([0.1, 5.0, 1.0]) * normal
    prior = FlowPrior(3, kind)
    prior.start_from_codes(codes)
    u, _ = prior.to_noise(codes)
    assert u.mean(dim=0).abs().max() < 1e-4 and (u.std(dim=0) - 1).abs().max() < 1e-4
    prior.start_from_codes(torch.ones(50, 3))  # no deviation at all
    assert torch.isfinite(prior.log_prob(torch.ones(1, 3))).all()


@every_flow
def test_half_precision_outside_does_not_reach_into_a_flow(make):
    prior, z = make(), torch.randn(20, make().dim, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, draws = prior.log_prob(z), prior.sample(5, generator())
    assert torch.equal(log_prob, prior.log_prob(z)) and torch.equal(draws, prior.sample(5, generator()))


# --- the KL by Monte Carlo ------------------------------------------------------------------------------------------

def posterior(requires_grad=False):
    mu, logvar = torch.randn(3, 4, generator=generator(5)), torch.randn(3, 4, generator=generator(6))
    return mu.requires_grad_(requires_grad), logvar.requires_grad_(requires_grad)


@every(KNOWN)
def test_one_draw_of_the_kl_is_the_difference_of_two_log_densities(make):
    prior, n = make(), make().dim
    mu, logvar, eps = (torch.randn(6, n, generator=generator(k)) for k in range(3))
    q = Normal(mu.double(), (logvar.double() / 2).exp())
    z = q.loc + q.scale * eps
    want = q.log_prob(z).sum(dim=1) - oracle(prior).log_prob(z)
    torch.testing.assert_close(kl_monte_carlo(mu, logvar, prior, eps), want, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("make", [lambda: StandardNormal(4), lambda: mixture(1)], ids=["normal", "any Gaussian"])
def test_the_mean_over_many_draws_is_the_closed_form_and_so_are_its_gradients(make):
    prior, n = make(), 40_000
    mu, logvar = posterior(requires_grad=True)
    one = isinstance(prior, GaussianMixture)
    p = MultivariateNormal(prior.means[0], scale_tril=prior.roots[0]) if one else oracle(prior)
    exact = kl_divergence(MultivariateNormal(mu, scale_tril=(logvar / 2).exp().diag_embed()), p)
    wide = lambda t: t.repeat_interleave(n, dim=0)
    found = kl_monte_carlo(wide(mu), wide(logvar), prior, torch.randn(3 * n, 4, generator=generator())).reshape(3, n)
    error = found.detach().std(dim=1) / math.sqrt(n)
    assert ((found.mean(dim=1) - exact).abs() < 5 * error).all() and (error < 0.01 * exact + 0.01).all()
    estimated = torch.autograd.grad(found.mean(dim=1).sum(), (mu, logvar))
    for a, b in zip(estimated, torch.autograd.grad(exact.sum(), (mu, logvar))):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_shapes_that_would_be_broadcast_are_refused():
    mu, logvar = posterior()
    for eps in (torch.zeros(1, 4), torch.zeros(4), torch.zeros(3, 5)):
        with complains("(B, 4)", tuple(eps.shape)):
            kl_monte_carlo(mu, logvar, StandardNormal(4), eps)


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


def test_the_fit_is_scikit_learns():
    from sklearn.mixture import GaussianMixture as Oracle

    codes = mixture(4, 3, seed=3, spread=3.0).sample(3_000, generator())
    theirs = Oracle(4, reg_covar=1e-4, max_iter=50, random_state=0).fit(codes.double().numpy())
    ours = fit_mixture(codes, 4)
    order = [(ours.means - torch.from_numpy(m).float()).norm(dim=1).argmin().item() for m in theirs.means_]
    assert sorted(order) == [0, 1, 2, 3]
    assert ours.log_prob(codes).mean().item() == pytest.approx(theirs.score(codes.numpy()), abs=2e-3)
    for mine, other in ((ours.weights, theirs.weights_), (ours.means, theirs.means_),
                        (ours.roots @ ours.roots.mT, theirs.covariances_)):
        torch.testing.assert_close(mine[order], torch.from_numpy(other).float(), rtol=0.05, atol=0.05)


def test_components_far_from_each_other_keep_their_small_spread():
    "In single precision a covariance taken as the mean square less the squared mean would lose it, or not be positive."
    centres = torch.tensor([[-300.0, 0.0], [300.0, 0.0]])
    codes = torch.cat([c + 0.05 * torch.randn(500, 2, generator=generator(i)) for i, c in enumerate(centres)])
    fit = fit_mixture(codes, 2)
    spread = (fit.roots @ fit.roots.mT).diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(spread, torch.full((2, 2), 0.05), rtol=0.15, atol=0)


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


def correlated(n, seed=0):
    "Codes far from N(0, I), and the distribution that they come from."
    truth = MultivariateNormal(torch.tensor([5.0, -1.0]), torch.tensor([[0.09, 0.5], [0.5, 4.0]]))
    return torch.randn(n, 2, generator=generator(seed)) @ truth.scale_tril.T + truth.loc, truth


def of_four(n, seed=0):
    return torch.randn(n, 4, generator=generator(seed)) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0])) + 1


@pytest.mark.parametrize("kind, layers", [("realnvp", 2), ("maf", 1)])
def test_a_fitted_flow_reaches_the_likelihood_of_the_distribution_itself(kind, layers):
    codes, truth = correlated(3_000)
    torch.manual_seed(0)
    prior = FlowPrior(2, kind, layers, hidden=16)
    curve = fit_prior(prior, codes, steps=300, lr=1e-2, every=100)
    unseen, _ = correlated(3_000, seed=1)
    with torch.no_grad():
        gap = truth.log_prob(unseen).mean() - prior.log_prob(unseen).mean()
    assert -0.01 < gap < 0.03 and not curve["problem"]  # independent normals would be 0.6 short: correlation 0.83
    z = prior.sample(4_000, generator())
    assert two_sample_test(unseen, z)["accuracy"] < 0.55


def test_a_learned_mixture_finds_the_parts_and_a_vampprior_moves_its_images_there():
    means = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    truth = GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, torch.eye(2).repeat(3, 1, 1))
    codes, unseen = truth.sample(3_000, generator(0)), truth.sample(3_000, generator(1))
    torch.manual_seed(0)
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[0.0, 5.0], [5.0, 0.0]]), torch.tensor([2.0, 2.0])
    vamp = VampPrior(2, (2, 1, 1), 12).bind(lambda u: (linear(u.flatten(1)), torch.zeros(len(u), 2)))
    before = copy.deepcopy(linear.state_dict())
    for prior, lr, within in ((MoGPrior(2, 12), 0.05, 0.05), (vamp, 0.05, 0.15)):
        fit_prior(prior, codes, steps=300, lr=lr, every=100)
        assert -0.02 < truth.log_prob(unseen).mean() - prior.log_prob(unseen).mean().detach() < within
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items()) and linear.weight.grad is None


@every(LEARNED)
def test_a_fit_follows_its_seed_and_nothing_else(make):
    codes, curves, states = of_four(300)[:, :make().dim], [], []
    for seed in (0, 0, 1):
        prior = make()
        state = torch.get_rng_state()
        curves.append(fit_prior(prior, codes, steps=10, every=5, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        states.append(torch.cat([p.detach().flatten() for p in prior.parameters()]))
    assert curves[0] == curves[1] != curves[2]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert curves[0]["step"] == [0, 5, 10] and len(curves[0]["train"]) == len(curves[0]["heldout"]) == 3


def test_the_best_parameters_are_kept_where_a_fit_learns_its_codes_by_heart():
    codes = of_four(60)
    prior = MoGPrior(4, 30)
    curve = fit_prior(prior, codes, steps=200, lr=0.1, heldout=0.5, every=20)
    assert curve["best_step"] == curve["step"][curve["heldout"].index(min(curve["heldout"]))] < 200
    assert curve["heldout"][-1] > min(curve["heldout"]) + 0.5 > curve["train"][-1]
    again = fit_prior(prior, codes, steps=0, heldout=0.5, restart=False)  # the same split, looked at once
    assert again["heldout"] == [pytest.approx(min(curve["heldout"]))] and again["step"] == [0]


def test_a_fit_that_diverges_ends_and_leaves_the_last_good_parameters():
    codes = of_four(500)
    for make, lr in ((flow, 30.0), (LEARNED["MAF"], 30.0), (LEARNED["MoG"], 1e4)):
        prior = make()
        curve = fit_prior(prior, codes, steps=60, lr=lr, every=10)
        assert "has diverged" in curve["problem"] and curve["step"][-1] < 60
        assert check_prior(prior, codes)["problem"] == "" and torch.isfinite(prior.sample(100, generator())).all()
        again = fit_prior(prior, codes, steps=0, restart=False)
        assert again["heldout"] == [pytest.approx(min(curve["heldout"]))]


def test_a_prior_that_is_broken_before_the_first_step_is_refused_and_left_alone():
    prior, far = flow(), MoGPrior(4, 1)
    nn.init.constant_(prior.transform._transforms[1].transform_net.initial_layer.bias, math.nan)
    nn.init.constant_(far.means, 1e4)
    for broken, restart in ((prior, True), (prior, False), (far, False)):
        before = copy.deepcopy(broken.state_dict())
        with complains(f"{type(broken).__name__} has diverged", "learning rate"):
            fit_prior(broken, of_four(100), steps=5, restart=restart)
        for name, t in broken.state_dict().items():
            torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_bad_start_is_no_reason_to_give_up():
    prior = MoGPrior(4, 3)
    nn.init.constant_(prior.means, 20.0)
    curve = fit_prior(prior, of_four(300), steps=200, lr=0.5, every=20, restart=False)
    assert not curve["problem"] and curve["best_step"] > 0 and not check_prior(prior, of_four(300))["problem"]


def test_codes_and_priors_that_cannot_be_fitted_are_refused():
    codes = of_four(100)
    with complains("StandardNormal has no parameters"):
        fit_prior(StandardNormal(4), codes)
    with complains("(100, 3)", "(N, 4)"):
        fit_prior(flow(), codes[:, :3])
    with complains("(100,)"):
        fit_prior(flow(), codes[:, 0])
    with complains("19 codes are too few"):
        fit_prior(flow(), codes[:19])
    with complains("not finite"):
        fit_prior(flow(), codes.clone().index_fill_(0, torch.tensor([7]), math.inf))
    with complains("heldout is 1.0"):
        fit_prior(flow(), codes, heldout=1.0)


# --- has it diverged? -----------------------------------------------------------------------------------------------

@every_prior
def test_a_sound_prior_passes_the_check(make):
    prior = make()
    codes = prior.sample(1_000, generator(8))
    report = check_prior(prior, codes)
    assert report["problem"] == "" and ("log_det" in report) == ("round_trip" in report) == isinstance(prior, FlowPrior)
    assert report["nll"] == pytest.approx(-prior.log_prob(codes[:500]).mean().item()) and 0.3 < report["reach"] < 3
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("kind", ["realnvp", "maf"])
@pytest.mark.parametrize("log_scale, said", [(12.0, "|log det|"), (-12.0, "|log det|"), (-3.0, "the farthest draw"),
                                             (math.nan, "-log p(z)")])
def test_each_way_of_diverging_is_caught(kind, log_scale, said):
    prior, codes = FlowPrior(4, kind), torch.randn(600, 4, generator=generator())
    nn.init.constant_(prior.transform._transforms[0].log_scale, log_scale)
    report = check_prior(prior, 1e-4 * codes if log_scale == 12.0 else codes)
    assert report["problem"].startswith(f"the FlowPrior has diverged ({said}")
    assert all(math.isfinite(v) for k, v in report.items() if k != "problem")
    if log_scale == -3.0:  # e³ times as far as the codes
        assert 0.5 * math.exp(3) < report["reach"] < 2 * math.exp(3)
        assert check_prior(prior, codes, max_reach=50)["problem"] == ""


def test_an_inverse_that_is_none_is_caught(monkeypatch):
    prior = flow()
    codes = prior.sample(500, generator())
    monkeypatch.setattr(prior, "from_noise", lambda u: codes + 0.05 * codes.norm(dim=1).max())
    assert "the inverse's error" in check_prior(prior, codes)["problem"]


def test_a_mixture_whose_draws_lie_far_away_is_caught():
    prior = MoGPrior(2, 10)
    prior.means.data[3] = 400.0
    problem = check_prior(prior, torch.randn(100, 2, generator=generator()))["problem"]
    assert "MoGPrior has diverged (the farthest draw" in problem


# --- two samples ----------------------------------------------------------------------------------------------------

def test_samples_of_one_distribution_are_told_apart_no_more_often_than_chance_allows():
    p_values = []
    for seed in range(12):
        found = two_sample_test(of_four(300, 2 * seed), of_four(300, 2 * seed + 1), seed)
        assert found["n"] == 300 and abs(found["accuracy"] - 0.5) < 5 * 0.5 / math.sqrt(300)
        assert found["p_value"] == pytest.approx(norm.sf(found["accuracy"], 0.5, 0.5 / math.sqrt(300)))
        p_values.append(found["p_value"])
    assert sum(p < 0.1 for p in p_values) <= 5 and min(p_values) > 1e-4


def test_two_normals_are_told_apart_as_often_as_the_best_classifier_does():
    a, b = torch.randn(4_000, 3, generator=generator(0)), torch.randn(4_000, 3, generator=generator(1))
    b[:, 1] += 2.0
    found = two_sample_test(a, b)
    assert found["accuracy"] == pytest.approx(norm.cdf(1.0), abs=0.025)  # half of the distance in deviations
    assert found["auc"] == pytest.approx(norm.cdf(math.sqrt(2)), abs=0.025) and found["p_value"] < 1e-9


def test_a_correlation_is_found_that_no_single_dimension_shows():
    codes, truth = correlated(2_000)
    independent = torch.stack([codes[:, 0], codes[torch.randperm(2_000, generator=generator()), 1]], dim=1)
    assert two_sample_test(codes, independent)["accuracy"] > 0.65


def test_the_two_sample_test_cuts_to_equal_sizes_and_follows_its_seed():
    a, b = of_four(400), of_four(150, 1)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = two_sample_test(a, b, seed=3)
    assert found["n"] == 150 and found == two_sample_test(a, b, seed=3) != two_sample_test(a, b, seed=4)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    with complains("49 codes are too few"):
        two_sample_test(a, b[:49])
    with complains("(150, 3)"):
        two_sample_test(a, b[:, :3])
    with complains("not finite"):
        two_sample_test(a * math.nan, b)


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


@pytest.mark.parametrize("name, kind", [("ex-pde", "GaussianMixture"), ("mog", "MoGPrior"), ("vamp", "VampPrior"),
                                        ("realnvp", "FlowPrior"), ("maf", "FlowPrior")])
def test_a_prior_fitted_by_name_knows_the_codes_better_than_the_vaes_own_and_follows_the_seed(vae, name, kind):
    data = shapes(400)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        prior = vae.fitted_prior(name, data)
        codes = vae.codes(data)
        assert type(prior).__name__ == kind and torch.equal(torch.random.get_rng_state(), state)
        assert prior.log_prob(codes).mean() > vae.prior.log_prob(codes).mean() + 0.1
    assert vae.fitted_prior(name, data) is prior and not any(p.requires_grad for p in prior.parameters())
    z = prior.sample(5, generator())
    again = randomised(VAE(image_size=16, z_dim=4, width=8, multipliers=(1, 2)), scale=0.3).fitted_prior(name, data)
    assert torch.equal(z, again.sample(5, generator()))
    assert not torch.equal(z, vae.fitted_prior(name, data, seed=1).sample(5, generator()))
    assert vae.fitted_prior(name, data) is prior  # kept beside that of the other seed
    vae.encoder.net[-1].bias.data[0] += 1.0  # other weights have other codes
    assert vae.fitted_prior(name, data) is not prior


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ex-pde", "mog", "vamp", "realnvp", "maf"])
def test_a_prior_is_fitted_and_drawn_from_where_the_vae_is(vae, name):
    prior = vae.cuda().fitted_prior(name, shapes(100))
    assert vae.sample(4, prior=prior, generator=torch.Generator("cuda").manual_seed(0)).isfinite().all()


def test_a_kept_prior_keeps_neither_model_nor_data_alive():
    vae, data = randomised(VAE(image_size=16, z_dim=4, width=8, multipliers=(1, 2)), scale=0.3), shapes(400)
    prior, model, images = vae.fitted_prior("ex-pde", data), weakref.ref(vae), weakref.ref(data)
    del vae, data
    gc.collect()
    assert model() is None and images() is None and prior.sample(2, generator()).isfinite().all()


def test_a_vamp_prior_by_name_needs_images():
    with complains("a VampPrior starts from images"):
        fit_by_name("vamp", of_four(500))


def test_an_unknown_name_is_no_prior(vae):
    with complains("'exPDE'", "ex-pde, mog, vamp, realnvp, maf"):
        vae.sampling_options({"prior": "exPDE"}, shapes(50))


def test_a_fit_by_name_that_diverges_warns_and_keeps_a_sound_prior():
    codes = of_four(500)
    with pytest.warns(UserWarning, match="fitting realnvp: the FlowPrior has diverged"):
        prior = fit_by_name("realnvp", codes, steps=60, lr=30.0, every=10)
    assert not check_prior(prior, codes)["problem"]


@pytest.mark.parametrize("name", ["ex-pde", "mog", "realnvp"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300, 1e30, -1e9])
def test_codes_that_cannot_be_fitted_get_one_sentence_for_every_prior(name, number):
    codes = torch.randn(100, 2, dtype=torch.float64, generator=generator())
    codes[3, 1] = number
    with complains("codes", "not finite, or beyond", "encoder"):
        fit_by_name(name, codes)


def test_a_flow_that_learned_nothing_is_named(monkeypatch):
    codes = torch.randn(200, 2, generator=generator())
    monkeypatch.setattr(priors._Optimiser, "step", lambda self, codes: None)
    with pytest.warns(UserWarning, match="fitting realnvp: it learned nothing"):
        fit_by_name("realnvp", codes, steps=3)
