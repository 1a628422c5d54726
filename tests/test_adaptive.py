"""Adaptive conditioning: inputs of the U-Net, ranks of uncertainty, steps, and the flow between."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.adaptive import (CHOSEN_ON, UNCERTAINTIES, STRATEGIES, Adaptation, AdaptiveDiffuseVAE, ConditionFlow,
                                UncertaintyHead, unchosen, uncertainty)
from hybridvae.core import Draws, build_model, image_draws, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.diffusion import GaussianDiffusion
from hybridvae.experiments import entries_of
from hybridvae.features import FaceEncoder, FeatureNetwork
from hybridvae.metrics import describe, paired
from hybridvae.priors import fit_mixture
from hybridvae.runs import STUDIES, Material
from hybridvae.training import TrainConfig, train
from scipy.stats import kstest, percentileofscore
from torch.distributions import Normal

pytestmark = pytest.mark.usefixtures("double_precision")

VAE_CONFIG = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
FLOWS = ({"kind": "realnvp", "layers": 2, "hidden": 8}, {"kind": "glow", "layers": 2, "hidden": 8})
VARIANTS = [{}, {"film": True}, {"z_guidance": True}, {"form": 2, "film": True, "z_guidance": True},
            {"flow": FLOWS[0]}, {"flow": FLOWS[1]}]
variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


def model(scale=0.3, **options):
    return randomised(AdaptiveDiffuseVAE(VAE_CONFIG, UNET, **options), scale=scale)


def images(n=8, seed=1):
    return torch.rand(n, 3, 16, 16, generator=generator(seed)) * 2 - 1


def coarse(m, n=6, seed=0):
    z = torch.randn(n, 4, generator=generator(seed))
    with torch.no_grad():
        return m.vae.decode(z), z


def network_of(m, x_cond, code, level):
    return lambda x_t, t: m.unet(x_t, t, cond=x_cond, z=code if m.z_guidance else None, extra=m.told(level))


def shapes(n=60, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, 16), factors)


# --- what the U-Net is given ----------------------------------------------------------------------------------------

@variants
def test_x_hat_fades_into_noise_as_the_strength_grows_and_the_level_is_an_input(options):
    m = model(**options)
    x_hat, z = coarse(m)
    strength, noise = torch.linspace(0, 1, 6), torch.randn(6, 3, 16, 16, generator=generator(3))
    with torch.no_grad():
        x_cond, code, level, _ = m.network_inputs(x_hat, z, strength, noise)
        clean = m.network_inputs(x_hat, z, 0 * strength, noise)[0]
    for i, s in enumerate(strength.tolist()):
        torch.testing.assert_close(x_cond[i], math.sqrt(1 - s * s) * clean[i] + s * noise[i])
    torch.testing.assert_close(x_cond[-1], noise[-1])
    assert torch.equal(level[:, 0], strength) and level.shape[1] == 1 + 4 * m.film
    if m.flow is None:
        assert torch.equal(clean, x_hat) and torch.equal(code, z)
    if m.film:
        torch.testing.assert_close(level[:, 1:], m.head(z)[0])


def test_the_control_meets_the_same_noise_and_is_not_given_its_level():
    m, control = model(), model(level_input=False)
    control.load_state_dict(m.state_dict())
    x_hat, z = coarse(m)
    strength, noise = torch.linspace(0.2, 1, 6), torch.randn(6, 3, 16, 16, generator=generator(3))
    with torch.no_grad():
        with_level, without = (part.network_inputs(x_hat, z, strength, noise) for part in (m, control))
        x_t, t = torch.zeros_like(x_hat), torch.zeros(6)
        predictions = [part.denoiser(*inputs[:3])(x_t, t) for part, inputs in ((m, with_level), (control, without))]
    assert torch.equal(with_level[0], without[0]) and not without[2].any() and with_level[2].all()
    assert not torch.isclose(*predictions).any(dim=-1).all()
    assert "level_input" not in m.config and not build_model(control.config).level_input


@variants
def test_the_denoiser_without_a_level_is_that_at_full_strength(options):
    m = model(**options)
    (x_hat, z), x_t, t = coarse(m), images(6), torch.full((6,), 300)
    with torch.no_grad():
        x_cond, code, level, _ = m.network_inputs(x_hat, z, torch.zeros(6), torch.zeros_like(x_hat))
        want = network_of(m, x_cond, code, level)(x_t, t)
        for network in (m.denoiser(x_hat, z), m.guided(x_hat, z, 1.0)):
            torch.testing.assert_close(network(x_t, t), want)


@variants
def test_the_loss_is_that_of_the_diffusion_given_the_noisy_x_hat_and_of_the_head(options):
    m, x, draws = model(**options).train(), images(), Draws(0, 0)
    found = m.training_loss(x, draws=Draws(0, 0))
    mu, logvar = m.vae.encode(x)
    z = Normal(mu, (logvar / 2).exp()).mean + (logvar / 2).exp() * draws.randn(8, 4)
    x_hat, t, eps = m.vae.decode(z), draws.randint(1000, 8), draws.randn(*x.shape)
    s = ((draws.rand(8) - 0.35) / 0.2).clamp(0, 1)
    x_cond, code, level, _ = m.network_inputs(x_hat, z, s, draws.randn(*x.shape))
    x_t = m.diffusion.q_sample(x, t, eps, x_cond if m.form == 2 else None)
    error = (network_of(m, x_cond, code, level)(x_t, t) - m.diffusion.target(x, t, eps)).square().mean(dim=(1, 2, 3))
    diffusion = (m.diffusion.loss_weight(t) * error).mean()
    predicted = m.head.net(z)
    error = (x - x_hat).square().mean(dim=(1, 2, 3))
    head = ((predicted[:, :4].clamp(-20, 10) - logvar).square().mean()
            + (predicted[:, 4] - error.log()).square().mean())
    torch.testing.assert_close(found["diffusion"], diffusion, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["loss"], diffusion + head, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["posterior_variance"], logvar.exp().mean())


@variants
def test_gradients_reach_every_trained_part_and_the_heads_loss_nothing_but_the_head(options):
    m = model(**options).train()
    m.training_loss(images(), draws=Draws(0, 0))["loss"].backward()
    assert all(p.grad is None for p in m.vae.parameters())
    trained = [(name, p.grad) for name, p in m.named_parameters() if p.requires_grad]
    unreached = [name for name, grad in trained if grad is None or not grad.abs().sum()]
    assert not unreached, unreached
    m.zero_grad()
    x_hat, z = coarse(m)
    x_cond, code, level, _ = m.network_inputs(x_hat, z, torch.full((6,), 0.3), torch.zeros(6, 3, 16, 16))
    m.diffusion.loss(m.denoiser(x_cond, code, level), images(6), torch.full((6,), 500), images(6)).sum().backward()
    assert all(p.grad is None or not p.grad.abs().sum() for p in m.head.parameters())


def test_a_head_learns_to_predict_for_new_codes_how_wide_and_how_wrong_they_are():
    z = torch.randn(1_200, 4, generator=generator(2))
    logvar, error = z.sin() - 2, (z[:, 0].abs() - 3).exp()
    torch.manual_seed(0)
    head = UncertaintyHead(4)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(z[:1_000], logvar[:1_000], error[:1_000]).backward()
        optimizer.step()
    with torch.no_grad():
        found = head(z[1_000:])
    explained = lambda a, b: 1 - (a - b).square().mean() / (b - b.mean(dim=0)).square().mean()
    assert explained(found[0], logvar[1_000:]) > 0.9 and explained(found[1], error[1_000:].log()) > 0.9


# --- uncertainty ----------------------------------------------------------------------------------------------------

def test_each_uncertainty_is_the_named_function_of_x_hat_and_code_alone():
    m = model()
    x_hat, z = coarse(m, 5)
    with torch.no_grad():
        want = {"re-encode": m.vae.encode(x_hat.clamp(-1, 1))[1].mean(dim=1),
                "head": m.head.net(z)[:, :4].clamp(-20, 10).mean(dim=1),
                "cycle": (m.vae.decode(m.vae.encode(x_hat.clamp(-1, 1))[0]) - x_hat).square().mean(dim=(1, 2, 3)),
                "error": m.head.net(z)[:, 4], "prior": -Normal(0.0, 1.0).log_prob(z).sum(dim=1)}
        for name, value in want.items():
            torch.testing.assert_close(m.uncertainty(name)(x_hat, z), value)
        density = m.uncertainty("density", shapes(200))(x_hat, z)
        torch.testing.assert_close(density, -m.vae.fitted_prior("realnvp", shapes(200)).log_prob(z))
    assert set(want) | {"density"} == set(UNCERTAINTIES)
    assert len({tuple(v.tolist()) for v in (*want.values(), density)}) == 6


def test_a_learned_prior_is_its_own_density():
    m = randomised(AdaptiveDiffuseVAE(VAE_CONFIG | {"prior": {"prior": "MoGPrior", "components": 3}}, UNET))
    x_hat, z = coarse(m)
    with torch.no_grad():
        torch.testing.assert_close(m.uncertainty("density")(x_hat, z), -m.vae.prior.log_prob(z))


def test_an_uncertainty_without_what_it_needs_is_refused():
    m = model()
    with complains("'sigma'", *UNCERTAINTIES):
        m.uncertainty("sigma")
    with complains("'head'", "UncertaintyHead"):
        uncertainty("head", m.vae)
    with complains("'density'", "fitted"):
        uncertainty("density", m.vae, m.head)
    with complains("'density'", "give data"):
        m.uncertainty("density")


@pytest.mark.parametrize("name", ["re-encode", "cycle", "error", "prior"])
@pytest.mark.parametrize("other", [False, True], ids=["its own prior", "another"])
def test_ranks_are_shares_of_the_draws_of_the_prior_that_is_sampled_from(name, other):
    m = model()
    prior = fit_mixture(torch.randn(60, 4, generator=generator(4)) * 0.3 + 1, 1) if other else None
    adaptation = m.adaptation(name, prior, n=400)
    with torch.no_grad():
        codes = (prior or m.vae.prior).sample(300, generator(9))
        values = m.uncertainty(name)(m.vae.decode(codes), codes)
        ranks = adaptation.rank(m.vae.decode(codes), codes)
        want = torch.tensor([percentileofscore(values.numpy(), v.item(), "strict") / 100 for v in values])
    assert (ranks - want).abs().max() < 0.15 and kstest(ranks.numpy(), "uniform").statistic < 0.12
    assert ranks[values.argmin()] == ranks.min() and ranks[values.argmax()] == ranks.max()
    far = torch.full((1, 4), 50.0)
    if name == "prior":
        assert adaptation.rank(m.vae.decode(far), far) == 1.0


def test_numbers_follow_the_rank_on_a_line_and_the_control_has_the_same_ones_on_other_images():
    z = torch.linspace(-3, 3, 40)[:, None].expand(-1, 4)
    options = dict(uncertainty=lambda x_hat, z: z[:, 0], quantiles=torch.linspace(-2, 2, 101), strength=(0.2, 0.6),
                   start=(0.5, 1.0))
    rank = ((z[:, 0] + 2) / 4).clamp(0, 1)
    strength, taken = Adaptation(**options)(None, z, 100)
    torch.testing.assert_close(strength, 0.2 + 0.4 * rank, atol=0.005, rtol=0)
    torch.testing.assert_close(taken / 100, 0.5 + 0.5 * rank, atol=0.015, rtol=0)
    many = torch.linspace(-2, 2, 4_000)[:, None].expand(-1, 4)
    own, shuffled = (Adaptation(**options, shuffled=on)(None, many, 100, generator())[0] for on in (False, True))
    torch.testing.assert_close(shuffled.sort()[0], own.sort()[0], atol=0.015, rtol=0)  # the same ones, but for chance
    assert torch.corrcoef(torch.stack([shuffled, own]))[0, 1].abs() < 0.05


def test_a_ramp_takes_what_lies_between_its_ranks_and_a_step_has_two_sides():
    z = torch.linspace(0, 1, 101)[:, None].expand(-1, 4)
    options = dict(uncertainty=lambda x_hat, z: z[:, 0], quantiles=torch.linspace(0, 1, 101), strength=(0.0, 1.0),
                   start=(0.4, 1.0))
    strength, taken = Adaptation(**options, ramp=(0.25, 0.75))(None, z, 10)
    torch.testing.assert_close(strength, ((z[:, 0] - 0.25) / 0.5).clamp(0, 1), atol=0.021, rtol=0)
    strength, taken = Adaptation(**options, ramp=(0.75, 0.75))(None, z, 10)
    assert set(strength.tolist()) == {0.0, 1.0} and strength.sum() == 25 and (strength[:76] == 0).all()
    assert torch.equal(taken, torch.where(strength > 0, 10, 4))
    strength, taken = Adaptation(strength=(0.3, 0.3), start=(0.6, 0.6), ramp=(0.75, 0.75))(None, z, 10)
    assert (strength == 0.3).all() and (taken == 6).all()


def test_ranges_out_of_bounds_are_refused():
    m = model()
    for options, words in (({"strength": (0, 1.5)}, ("strength", "from 0 to 1")),
                           ({"start": (0.0, 1.0)}, ("start", "above 0")),
                           ({"strength": (0.0, 0.5)}, ("strength goes from 0 to 0.5", "no uncertainty"))):
        with complains(*words):
            m.adaptation(**options)
    with complains("ramp", "from 0 to 1"):
        m.adaptation("prior", strength=(0.0, 0.5), ramp=(0.8, 0.2))
    with complains("'density'", "give data"):
        m.adaptation("density", strength=(0.0, 0.5))
    with pytest.raises(ValueError, match="quantiles is None"):
        Adaptation(lambda x_hat, z: z[:, 0]).rank(*coarse(m))
    with pytest.raises(ValueError, match="guidance_weight=1"):
        m.refine(*coarse(m), guidance_weight=2.0)
    with pytest.raises(ValueError, match="needs z"):
        m.refine(coarse(m)[0])
    with pytest.raises(ValueError, match="concat=True and cond_dropout=0"):
        model(cond_dropout=0.1)
    for levels in ((0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(ValueError, match="levels.*two shares"):
            model(levels=levels)


# --- refining -------------------------------------------------------------------------------------------------------

@variants
def test_without_an_adaptation_a_refinement_is_that_of_the_diffusion_with_the_clean_x_hat(options):
    m = model(**options)
    x_hat, z = coarse(m)
    found = m.refine(x_hat, z, steps=3, generator=generator(5))
    with torch.no_grad():
        x_cond, code, level, _ = m.network_inputs(x_hat, z, torch.zeros(6), torch.zeros(6, 3, 16, 16))
        noise = torch.randn(6, 3, 16, 16, generator=generator(5))
        shift = x_cond if m.form == 2 else None
        want = GaussianDiffusion(**m.diffusion.config).sample(
            network_of(m, x_cond, code, level), noise, "dpmpp", 3, shift).clamp(-1, 1)
    torch.testing.assert_close(found, want)
    assert m.sample(4, steps=2, generator=generator()).shape == (4, 3, 16, 16)


@variants
def test_the_bound_on_the_likelihood_is_that_of_the_refiner_at_full_strength(options):
    m, x = model(**options), torch.randint(256, (4, 3, 16, 16), generator=generator(4)) / 127.5 - 1
    found, draws = m.likelihood_bound(x, image_draws(0, 0, 4), timesteps=3), image_draws(0, 0, 4)
    with torch.no_grad():
        mu, logvar = m.vae.encode(x)
        z = mu + (logvar / 2).exp() * draws.randn(*mu.shape)
        x_hat = m.vae.decode(z)
        x_cond, code, level, _ = m.network_inputs(x_hat, z, torch.zeros(4), torch.ones_like(x_hat))
        want = m.diffusion.likelihood_bound(network_of(m, x_cond, code, level), x, draws, 3, m.shift(x_cond))
    assert torch.equal(found["kl"], m.vae.likelihood_bound(x, image_draws(0, 0, 4))["kl"])
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", [1, 2])
def test_each_image_takes_its_own_steps_from_its_own_start(form):
    m = model(form=form)
    x_hat, z = coarse(m, 7)
    adaptation = Adaptation(lambda x_hat, z: z[:, 0], z[:, 0].sort()[0][[0, 2, 4, 6]], strength=(0.0, 0.8),
                            start=(0.1, 1.0))
    calls = []
    m.unet.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    found = m.refine(x_hat, z, adaptation=adaptation, steps=6, generator=generator(5))
    assert sum(calls) / 7 == pytest.approx(adaptation.report()["nfe"])
    g = generator(5)
    noise = torch.randn(7, 3, 16, 16, generator=g)
    strength, counts = adaptation(x_hat, z, 6)
    own = torch.randn(7, 3, 16, 16, generator=g)
    taken = [max(1, min(6, round(6 * (0.1 + 0.9 * r)))) for r in adaptation.rank(x_hat, z).tolist()]
    assert taken == counts.tolist() and len(set(taken)) > 2 and min(taken) == 1
    grid = m.diffusion.timestep_grid(6)
    for i, k in enumerate(taken):
        with torch.no_grad():
            x_cond, code, level, _ = m.network_inputs(x_hat[i:i + 1], z[i:i + 1], strength[i:i + 1], own[i:i + 1])
            a = m.diffusion.alphas_cumprod[grid[6 - k]]
            y = noise[i:i + 1] if k == 6 else math.sqrt(a) * x_hat[i:i + 1] + math.sqrt(1 - a) * noise[i:i + 1]
            shift = x_cond if form == 2 else None
            want = m.diffusion.sample(network_of(m, x_cond, code, level), y, "dpmpp", grid[6 - k:], shift)
        torch.testing.assert_close(found[i:i + 1], want.clamp(-1, 1), rtol=1e-6, atol=1e-8)


def test_strategies_share_codes_and_noise():
    m, data = model(), shapes(60)
    def draw(**asked):
        "Two batches, as an evaluation draws them."
        options = m.sampling_options({"sampler": "ancestral", "steps": 2, **asked}, data)  # draws noise on its way, too
        batches = [m.sample_pairs(5, generator=image_draws(0, i, i + 5), **options) for i in (0, 5)]
        return [torch.cat(parts) for parts in zip(*batches)]
    plain, fixed, start = draw(), draw(strength=[0.0, 0.0]), draw(start=[0.5, 0.5])
    adaptive, control = (draw(strength=[0.0, 0.9], uncertainty="prior", **more) for more in ({}, {"shuffled": True}))
    for x_hat, _ in (fixed, start, adaptive, control):
        assert torch.equal(x_hat, plain[0])
    assert torch.equal(plain[1], fixed[1])
    assert not torch.equal(plain[1], adaptive[1]) and not torch.equal(adaptive[1], control[1])


def test_options_become_an_adaptation_and_the_prior_is_fitted_beside():
    m, data = model(), shapes(60)
    options = m.sampling_options({"sampler": "ddim", "steps": 2, "prior": "ex-pde", "uncertainty": "head",
                                  "start": [0.5, 1.0], "ramp": [0.2, 0.9]}, data)
    assert set(options) == {"sampler", "steps", "prior", "adaptation"}
    assert options["adaptation"].start == [0.5, 1.0] and options["adaptation"].ramp == [0.2, 0.9]
    ranks = m.adaptation("head", options["prior"]).quantiles  # among draws of the prior that is asked for
    assert torch.equal(options["adaptation"].quantiles, ranks)
    assert not torch.equal(ranks, m.adaptation("head").quantiles)
    assert m.sampling_options({"steps": 2}, None) == {"steps": 2}
    m.sample(9, generator=generator(), **options)
    report = options["adaptation"].report()
    assert set(report) == {"mean_rank", "mean_strength", "nfe"}
    assert 1 <= report["nfe"] <= 2 and 0 < report["mean_rank"] < 1


# --- the flow between -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", FLOWS, ids=lambda o: o["kind"])
def test_a_new_flow_changes_nothing(options):
    m = AdaptiveDiffuseVAE(VAE_CONFIG, UNET, flow=options)
    x_hat, z = coarse(m)
    with torch.no_grad():
        mapped, code, log_det = m.flow(m.vae, x_hat, z, torch.randn(6, 2, generator=generator()))
    torch.testing.assert_close(mapped, x_hat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(code, z, rtol=1e-3, atol=1e-3)
    assert log_det < 1e-3


@pytest.mark.parametrize("options", FLOWS, ids=lambda o: o["kind"])
def test_a_flows_log_determinant_is_autograds_and_it_can_be_undone_and_sees_the_uncertainty(options):
    flow = randomised(ConditionFlow(z_dim=4, channels=1, **options), scale=0.3)
    x = torch.randn(2, *((4,) if options["kind"] == "realnvp" else (1, 4, 4)), generator=generator())
    context = torch.randn(2, 2, generator=generator(1))
    wide = context if x.dim() == 2 else context[:, :, None, None].expand(-1, -1, 2, 2)
    mapped, log_det = flow.transform(x, wide)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.transform(v[None], wide[:1])[0].flatten(), x[0])
    torch.testing.assert_close(jacobian.reshape(x[0].numel(), -1).slogdet()[1], log_det[0])
    torch.testing.assert_close(flow.transform.inverse(mapped, wide)[0], x, rtol=1e-5, atol=1e-5)
    assert (flow.transform(x, -wide)[0] - mapped).abs().max() > 1e-3


def test_another_kind_of_flow_is_refused():
    with complains("'maf'", "'realnvp' or 'glow'"):
        model(flow={"kind": "maf"})


# --- checkpoints, training, studies, entries ------------------------------------------------------------------------

@variants
def test_a_new_model_is_the_pair_that_it_starts_from(options):
    "Full strength, nothing trained yet: sample for sample the parent's."
    rest = {k: v for k, v in options.items() if k in ("form", "z_guidance")}
    parent = randomised(DiffuseVAE(VAE_CONFIG, UNET, **rest), scale=0.3)
    m = AdaptiveDiffuseVAE(VAE_CONFIG, UNET, **options)
    m.vae.load_state_dict(parent.vae.state_dict())
    m.unet.load_state_dict(parent.unet.state_dict())
    x_hat, z = coarse(parent)
    want = parent.refine(x_hat, z, steps=3, generator=generator())
    torch.testing.assert_close(m.eval().refine(x_hat, z, steps=3, generator=generator()), want, rtol=1e-3, atol=1e-3)


@variants
def test_a_saved_model_samples_the_same(options, tmp_path):
    m = model(**options)
    for again in (load_model(save_model(m, tmp_path / "m.safetensors")), build_model(m.config)):
        assert again.config == m.config and isinstance(again, DiffuseVAE)
    again = load_model(tmp_path / "m.safetensors")
    own, other = (each.sample(2, steps=2, generator=generator()) for each in (m, again))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_training_moves_refiner_head_and_flow_and_leaves_the_vae(tmp_path):
    m = AdaptiveDiffuseVAE(VAE_CONFIG, UNET, film=True, flow=FLOWS[0])
    before = {k: v.clone() for k, v in m.state_dict().items()}
    config = TrainConfig(kimg=0.32, batch_size=16, n_slices=1, lr=1e-2)
    result = train(m, shapes(), config, tmp_path, heldout=shapes(32, 100), progress=False, cpu=True)
    moved = {k.split(".")[0] for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"unet", "told", "head", "flow"} and result.stopped is None
    assert {"heldout_head", "heldout_diffusion", "log_det", "posterior_variance"} <= set(result.history[-1])


def test_half_precision_reaches_neither_ranks_nor_head():
    "What decides between coarse images is computed in full precision; everything else may be halved."
    m = model(film=True, flow=FLOWS[0]).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = m.training_loss(images().float(), draws=Draws(0, 0))
        loss["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters()) and loss["loss"].isfinite()
    m.eval()
    x_hat, z = (v.float() for v in coarse(m, 200))
    for name in ("head", "error", "cycle", "re-encode"):
        adaptation = m.adaptation(name, strength=(0.0, 1.0), start=(0.5, 1.0))
        want = adaptation.rank(x_hat, z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(adaptation.rank(x_hat, z), want) and len(want.unique()) > 50
            assert m.refine(x_hat[:8], z[:8], adaptation=adaptation, steps=2, generator=generator()).isfinite().all()


@pytest.fixture
def features():
    torch.manual_seed(0)
    return FeatureNetwork(image_size=16, width=4, num_features=6).double()


@pytest.mark.parametrize("name", ["uncertainty", "adaptive", "priors", "noise", "truncation"])
def test_a_study_answers_with_finite_numbers_the_same_ones_every_time(features, name, monkeypatch):
    m, asked, refine = model(), [], AdaptiveDiffuseVAE.refine
    def recorded(self, *args, **options):
        asked.append(options["steps"])
        return refine(self, *args, **options)
    monkeypatch.setattr(AdaptiveDiffuseVAE, "refine", recorded)
    look = Material(shapes(120), shapes(60, 200), features, describe(features, shapes(60, 200)), 12, 7, steps=2)
    text = json.dumps(STUDIES[name](m, look), allow_nan=False)
    assert set(asked) == (set() if name == "uncertainty" else {2})  # those of the material, wherever it refines
    torch.manual_seed(1)
    assert json.dumps(STUDIES[name](m, look)) == text


def test_images_left_out_are_the_uncertain_ones_and_the_number_stays(features, monkeypatch):
    m, seen = model(), []
    look = Material(shapes(60), shapes(60, 200), features, describe(features, shapes(60, 200)), 10, 16)
    certain = m.adaptation("cycle")

    def refine(x_hat, z, **options):
        seen.append(certain.rank(x_hat, z))
        return x_hat
    monkeypatch.setattr(m, "refine", refine)
    found, ranks = STUDIES["truncation"](m, look), torch.cat(seen).reshape(4, -1)
    assert ranks.shape[1] == found["n"] == 40
    assert all(part.max() <= share < part.max() + 0.2 for part, share in zip(ranks, (1.0, 0.75, 0.5, 0.25)))


def test_the_kl_of_the_vaes_own_prior_is_the_closed_form_on_average(features):
    m, test = model(), shapes(200, 300)
    m.refine = lambda x_hat, z, **options: x_hat
    found = STUDIES["priors"](m, Material(shapes(120), test, features, describe(features, test), 12, 50))["own"]
    mu, logvar = m.vae.encode(test.float().double())
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    assert found["KL"] == pytest.approx(kl.item(), rel=0.15) and found["ELBO"] < -found["KL"]


def test_quarters_go_from_the_most_certain_images_to_the_least(features, monkeypatch):
    "Where the refinement of an uncertain x̂ is far from every image, its quarter has no precision."
    features.factors = False
    features.forward = lambda images: images.double().amax(dim=(2, 3)).repeat(1, 2) / 255  # is there any light?
    m, look = model(), Material(shapes(60), shapes(60, 200), features, describe(features, shapes(60, 200)), 15, 30)
    certain = m.adaptation("cycle")
    real = shapes(60, 200).float().double()

    def refine(x_hat, z, **options):
        good = certain.rank(x_hat, z) < 0.5
        return torch.where(good[:, None, None, None], real[:len(z)], torch.full_like(x_hat, -1.0))
    monkeypatch.setattr(m, "refine", refine)
    quarters = STUDIES["adaptive"](m, look)["full conditioning"]["precision by quarter"]
    assert quarters[0] == 1 and quarters[3] == 0


CLASSES = FeatureNetwork(image_size=16, width=4, num_features=6, classes=10, factors=False)
FACES = FaceEncoder(image_size=16, channels=(4, 4), blocks=1, projection=0)


@pytest.mark.parametrize("network", [CLASSES, FACES], ids=["classes", "faces"])
def test_networks_that_read_no_shapes_do_without_agreement(network):
    m = model()
    m.refine = lambda x_hat, z, **options: x_hat
    look = Material(shapes(60), shapes(60, 200), network.double().eval(), describe(network, shapes(60, 200)), 12, 16)
    assert "agreement" not in STUDIES["adaptive"](m, look)["full conditioning"]


def test_the_ranking_of_uncertainties_finds_the_one_that_is_right(features, monkeypatch):
    m, test = model(), shapes(60, 200)
    real = test.float().double()
    monkeypatch.setattr(m, "uncertainty", lambda name, *args: (lambda x_hat, z: {
        "error": lambda: (x_hat - real[:len(x_hat)]).square().mean(dim=(1, 2, 3)),
        "head": lambda: -(x_hat - real[:len(x_hat)]).square().mean(dim=(1, 2, 3)),
    }.get(name, lambda: z[:, 0])()))
    found = STUDIES["uncertainty"](m, Material(shapes(120), test, features, None, 12, 60))
    assert found["error"]["rank correlation"] == pytest.approx(1)
    assert found["head"]["rank correlation"] == pytest.approx(-1)
    assert abs(found["re-encode"]["rank correlation"]) < 0.5
    assert found["error"]["error by tenth"] == sorted(found["error"]["error by tenth"])


def test_entries_have_names_and_configs_of_their_own_and_what_they_need_exists():
    from hybridvae.campaign import queue
    for dataset in ("shapes", "cifar10", "celeba64"):
        entries = entries_of(dataset, "adaptive")
        sizes = (dataset,) if dataset == "shapes" else (dataset, f"{dataset}-cpu")
        known = {(e.experiment, e.seed) for e in queue(*sizes)}
        assert len({(e.experiment, e.seed) for e in entries}) == len(entries)
        configs = [json.dumps(e.config, sort_keys=True) + str(e.seed) for e in entries]
        assert len(set(configs)) == len(configs)
        for e in entries:
            assert all((parent, e.seed) in known for parent in e.depends_on.values()), e.experiment
            assert set(e.studies) <= set(STUDIES) and build_model(e.model).config["model"] == e.model["model"]
        assert {e.seed for e in entries} == {0, 1, 2}


def test_studies_refine_on_the_grid_on_which_the_strategies_are_evaluated():
    for e in (e for e in entries_of(stage="adaptive") if e.studies):
        grids = {asked["steps"] for asked in e.evaluations
                 if any(asked.items() >= options.items() for options in STRATEGIES.values() if options)}
        assert grids == {10} == {e.steps_study}, e.experiment


# --- what the lesson may claim --------------------------------------------------------------------------------------

def lesson():
    path = Path(__file__).parents[1] / "nbs" / "03_adaptive_conditioning.ipynb"
    return json.loads(path.read_text())["cells"]


def shown_tables():
    "The tables that the lesson shows, as stored."
    for cell in lesson():
        for out in cell.get("outputs", []):
            if html := "".join(out.get("data", {}).get("text/html", "")):
                yield re.sub(r"<style.*?</style>", "", html, flags=re.S)


@pytest.mark.parametrize("as_read", [list, tuple])
def test_what_uses_the_quarter_loses_the_seed_on_which_it_was_chosen(as_read):
    values = {0: 7.0, 1: 8.0, 2: 9.0}
    for name, asked in STRATEGIES.items():
        asked = {k: as_read(v) if isinstance(v, list) else v for k, v in asked.items()}
        for more in ({}, {"steps": 10, "prior": "realnvp"}, {"uncertainty": "head"}):
            left = unchosen(values, asked | more)
            assert left == {k: v for k, v in values.items() if "ramp" not in asked or k != CHOSEN_ON}, name
    assert sum("ramp" in asked for asked in STRATEGIES.values()) == 4 and CHOSEN_ON == 0
    adaptive, full = (unchosen(values, STRATEGIES[name]) for name in ("adaptive strength", "full conditioning"))
    assert paired(adaptive, full) is None  # two seeds are left: no claim


def test_the_family_of_the_lesson_says_lower_and_higher_only_where_the_interval_leaves_out_0():
    families = [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
                 for row in re.findall(r"<tr>.*?</tr>", table, flags=re.S)]
                for table in shown_tables() if "p (Holm)" in table]
    assert list(map(len, families)) == [8, 25]  # on Scenes, and on Shapes
    for name, difference, interval, p, verdict, _, seeds in families[0] + families[1]:
        low, high = map(float, interval.strip("[]").split(","))
        assert low <= float(difference) <= high and int(seeds) >= 3, name
        assert verdict == "not told apart" or (float(p) < 0.05 and (high < 0 if verdict == "lower" else low > 0)), name
    rows = families[1]  # where the quarter was chosen on one of the seeds
    assert not any(name.startswith("adaptive") or "quarter" in name for name, *_ in rows)
    printed = ["".join(out["text"]) for c in lesson() for out in c.get("outputs", []) if "text" in out]
    assert f"Family of Stage 3: {len(rows)} comparisons" in "".join(printed)


def test_no_distance_of_the_lesson_stands_without_its_floor_or_below_a_thousand_images():
    head = re.compile(r"<thead>.*<th[^>]*>(\S.*: )?FD( \(shapes\))?</th>.*</thead>", flags=re.S)
    tables = [table for table in shown_tables() if head.search(table)]
    assert len(tables) >= 6
    for table in tables:
        images = [int(n.replace(",", "")) for n in re.findall(r"n = ([\d,]+)", table)]
        assert images and min(images) >= 1_000, table
