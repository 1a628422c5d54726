"""Latent diffusion: codes with and without a place, their statistics, training, and the hybrid of trained parts."""
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.campaign import queue
from hybridvae.core import (Draws, HybridVAEError, build_model, count_flops, load_model, randn, save_model, to_uint8,
                            weights_hash)
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.diffusion import GaussianDiffusion
from hybridvae.experiments import entries_of
from hybridvae.features import FeatureNetwork
from hybridvae.latent import (TIMES_LESS, DiffusionPrior, LatentDiffuseVAE, LatentDiffusion, ResidualMLP, gain,
                              sampling_flops)
from hybridvae.metrics import describe, frechet_distance, paired, paired_family
from hybridvae.priors import StandardNormal
from hybridvae.entries import Entry
from hybridvae.runs import STUDIES, Material, run_entry
from hybridvae.training import TrainConfig, train
from hybridvae.records import mean_and_spread, values_of

VECTOR = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
PLACES = dict(image_size=16, z_channels=2, width=8, multipliers=(1, 2), patch=2)  # 2 x 4 x 4
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
MLP, SMALL = {"width": 8, "blocks": 1}, {"width": 8, "multipliers": [1, 2], "attention": [4]}
KINDS = {"vector": (VECTOR, MLP), "places": (PLACES, SMALL)}
kinds = pytest.mark.parametrize("kind", KINDS)
COSINE = {"schedule": "cosine", "prediction": "v", "weighting": "min_snr"}


def latent(kind, scale=0.2):
    return randomised(LatentDiffusion(*KINDS[kind], COSINE), scale=scale)


def hybrid(kind="vector", **options):
    vae, denoiser = KINDS[kind]
    return randomised(LatentDiffuseVAE(vae, UNET, COSINE, denoiser=denoiser, latent_diffusion=COSINE, **options))


def images(n=8, seed=1):
    return torch.rand(n, 3, 16, 16, generator=generator(seed)) * 2 - 1


def shapes(n=60, start=0, split="train"):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", split, draw_shapes(factors, 16), factors)


# --- the denoiser of vectors ----------------------------------------------------------------------------------------

def test_the_mlp_sees_code_and_time_and_starts_at_zero():
    z, t = torch.randn(6, 5, generator=generator()), torch.arange(6) * 100
    fresh = ResidualMLP(5, width=16, blocks=2)
    assert torch.equal(fresh(z, t), torch.zeros(6, 5))
    mlp = randomised(ResidualMLP(5, width=16, blocks=2))
    with torch.no_grad():
        assert (mlp(z, t) - mlp(z, t + 50)).abs().amax(dim=1).min() > 1e-3
        assert (mlp(z, t) - mlp(z + 0.1, t)).abs().amax(dim=1).min() > 1e-3
        torch.testing.assert_close(mlp(z, t)[2:3], mlp(z[2:3], t[2:3]))  # each image by itself
    mlp(z, t).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mlp.parameters())


# --- the prior ------------------------------------------------------------------------------------------------------

def test_vectors_are_measured_by_dimension_and_places_by_channel():
    codes = torch.randn(500, 8, generator=generator()) * torch.arange(1, 9) + torch.arange(8)
    vector = DiffusionPrior((8,), MLP)
    places = DiffusionPrior((2, 2, 2), {"width": 8, "multipliers": [1], "attention": []})
    vector.measure(codes)
    np.testing.assert_allclose(vector.mean, codes.numpy().mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(vector.deviation, codes.numpy().std(axis=0, ddof=1), rtol=1e-5)
    places.measure(codes)
    blocks = codes.numpy().reshape(500, 2, 4)
    np.testing.assert_allclose(places.mean.flatten(), blocks.mean(axis=(0, 2)), rtol=1e-5)
    np.testing.assert_allclose(places.deviation.flatten(), [blocks[:, c].std(ddof=1) for c in (0, 1)], rtol=1e-5)


def test_one_code_has_no_deviation():
    with complains("1 codes", "at least two"):
        DiffusionPrior((4,), MLP).measure(torch.zeros(1, 4))


def test_a_number_that_never_changes_does_not_divide_by_zero():
    prior = DiffusionPrior((4,), MLP)
    prior.measure(torch.ones(10, 4))
    assert torch.isfinite(prior.loss(torch.ones(3, 4), Draws(0, 0))).all()


@pytest.mark.parametrize("shape, denoiser", [((3,), MLP), ((3, 4, 4), SMALL)])
def test_normal_codes_are_drawn_with_the_mean_and_deviation_that_were_measured(shape, denoiser):
    # for x₀ ~ N(0, I) the best v is 0 at every t, which is what an untrained denoiser predicts: its draws must be exact
    prior = DiffusionPrior(shape, denoiser, COSINE)
    offset, scale = torch.tensor([5.0, -2.0, 0.5]), torch.tensor([3.0, 0.1, 1.0])
    spread = lambda v: v.repeat_interleave(math.prod(shape) // 3)
    codes = spread(offset) + spread(scale) * torch.randn(4_000, math.prod(shape), generator=generator())
    prior.measure(codes)
    n = 3_000 * 3 // math.prod(shape) + 300
    drawn = prior.sample(n, generator(1), sampler="ancestral", steps=250).reshape(n, 3, -1).transpose(0, 1).flatten(1)
    error = 4 / math.sqrt(drawn.shape[1])
    assert ((drawn.mean(dim=1) - offset).abs() < error * scale + 0.06 * scale).all()
    assert ((drawn.std(dim=1) / scale - 1).abs() < 0.05).all()  # clipped to [-1, 1] it would be far less


def test_the_loss_is_the_diffusion_loss_of_normalised_codes():
    prior = randomised(DiffusionPrior((4,), MLP, COSINE))
    z = 3 * torch.randn(16, 4, generator=generator(2)) + 1
    prior.measure(z)
    draws = Draws(3, 0)
    t, eps = draws.randint(1000, 16), draws.randn(16, 4)
    x0 = (z - z.mean(dim=0)) / z.std(dim=0)
    alpha_bar = torch.from_numpy(GaussianDiffusion(**COSINE).alphas_cumprod)[t, None].float()
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    snr = alpha_bar / (1 - alpha_bar)
    with torch.no_grad():
        want = (snr.clamp(max=5) / (snr + 1))[:, 0] * (prior.denoiser(x_t, t) - v).square().mean(dim=1)
        torch.testing.assert_close(prior.loss(z, Draws(3, 0)), want, rtol=1e-4, atol=1e-6)


def test_it_learns_two_points_that_no_normal_distribution_fits():
    torch.manual_seed(0)
    prior, points = DiffusionPrior((2,), {"width": 32, "blocks": 2}, COSINE), torch.tensor([[4.0, 1.0], [-4.0, 3.0]])
    prior.measure(points.repeat(50, 1))
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for step in range(400):
        optimizer.zero_grad()
        prior.loss(points.repeat(64, 1), Draws(0, step)).mean().backward()
        optimizer.step()
    apart = torch.cdist(prior.sample(400, generator()), points)
    assert (apart.min(dim=1).values < 0.5).float().mean() > 0.95
    assert 0.4 < (apart.argmin(dim=1) == 0).float().mean() < 0.6


@kinds
def test_draws_are_those_of_the_noise_and_of_the_steps_asked_for(kind):
    prior = latent(kind).latent
    noise = torch.randn(3, *prior.code_shape, generator=generator(4))
    torch.testing.assert_close(prior.from_noise(noise, steps=3), prior.sample(3, generator(4), steps=3))
    calls = []
    handle = prior.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1][0].item()))
    prior.sample(2, generator(), sampler="ddim", steps=4)
    handle.remove()
    assert calls == prior.diffusion.timestep_grid(4)[:-1]


# --- the model ------------------------------------------------------------------------------------------------------

@kinds
def test_only_the_denoiser_is_trained_and_the_vae_stays_in_evaluation_mode(kind):
    model = LatentDiffusion(*KINDS[kind], COSINE).train()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"denoiser"}
    assert not model.vae.training and model.latent.training
    randomised(model).train()
    model.training_loss(images())["loss"].backward()
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(p.grad is not None for p in model.latent.denoiser.parameters())


@kinds
def test_a_sample_is_what_the_decoder_makes_of_a_drawn_code(kind):
    model = latent(kind)
    z = model.latent.sample(5, generator(), sampler="ddim", steps=3)
    made = model.sample(5, sampler="ddim", steps=3, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(made, model.vae.decode(z).clamp(-1, 1))
    assert made.shape == (5, 3, 16, 16) and made.abs().max() <= 1
    assert not torch.equal(made, model.sample(5, sampler="ddim", steps=3, generator=generator(1)))
    another = StandardNormal(model.vae.z_dim)
    with torch.no_grad():
        want = model.vae.decode(another.sample(5, generator())).clamp(-1, 1)
    torch.testing.assert_close(model.sample(5, prior=another, generator=generator()), want)
    assert model.nfe(steps=3) == 3 and model.nfe(steps=3, prior=another) == 0


@kinds
def test_codes_are_drawn_in_training(kind):
    model, x = latent(kind), images(2).repeat(4, 1, 1, 1)
    seen = []
    loss = model.latent.loss
    model.latent.loss = lambda z, draws: seen.append(z) or loss(z, draws)
    model.training_loss(x, draws=Draws(0, 0))
    mu, logvar = model.vae.encode(x)
    assert seen[0].shape == (8, model.vae.z_dim)
    assert (seen[0][0] - seen[0][2]).abs().max() > 1e-3  # the same image, another draw
    eps = Draws(0, 0).randn(*mu.shape)
    torch.testing.assert_close(seen[0], mu + (0.5 * logvar).exp() * eps)


@kinds
def test_training_measures_the_codes_first_and_the_weights_file_holds_what_was_measured(kind, tmp_path):
    torch.manual_seed(0)
    model = LatentDiffusion(*KINDS[kind], COSINE)
    data = shapes()
    train(model, data, TrainConfig(kimg=0.032, batch_size=16), tmp_path / "run", progress=False, cpu=True)
    codes = model.vae.codes(data).reshape(60, model.vae.code_shape[0], -1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.latent.deviation.flatten(), codes.std(dim=1), rtol=1e-4, atol=1e-5)
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    assert weights_hash(again) == weights_hash(model) and again.config == json.loads(json.dumps(model.config))
    own, other = (each.sample(2, steps=2, generator=generator()) for each in (again, model))
    torch.testing.assert_close(own, other)


# --- the hybrid -----------------------------------------------------------------------------------------------------

def counted(model, **options):
    "Evaluations of the latent denoiser and of the U-Net in one call of `sample`."
    calls = {"latent": 0, "unet": 0}
    handles = [network.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
               for name, network in (("latent", model.latent.denoiser), ("unet", model.unet))]
    model.sample(2, generator=generator(), **options)
    for handle in handles:
        handle.remove()
    return calls


@kinds
@pytest.mark.parametrize("options", [{"refine_steps": 1}, {"refine_steps": 4}, {"refine_steps": 6, "start": 1.0},
                                     {"refine_steps": 0}, {}], ids=str)
def test_nfe_is_the_number_of_evaluations_of_both_networks(kind, options):
    model, steps = hybrid(kind), 3
    found = counted(model, steps=steps, **options)
    assert found == {"latent": steps, "unet": options.get("refine_steps", 4)}
    assert model.nfe(steps=steps, **options) == sum(found.values())
    prior = StandardNormal(model.vae.z_dim)
    without = counted(model, steps=steps, prior=prior, **options)
    assert sum(without.values()) == model.nfe(steps=steps, prior=prior, **options)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("steps, start", [(1, 0.4), (2, 0.4), (4, 0.4), (3, 0.7)])
def test_a_refinement_runs_the_last_share_of_the_process_from_x_hat_with_noise(form, steps, start):
    model = hybrid(form=form)
    z = torch.randn(3, 4, generator=generator())
    with torch.no_grad():
        x_hat = model.vae.decode(z)
    seen = []
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1][0].item())))
    noise = torch.randn(x_hat.shape, generator=generator(1))
    refined = model.refine(x_hat, z, steps=steps, start=start, noise=noise)
    handle.remove()
    grid = [1000 * start * (steps - i) / steps - 1 for i in range(steps)]
    assert [at for _, at in seen] == pytest.approx(grid, abs=0.51)
    alpha_bar = model.diffusion.alphas_cumprod[seen[0][1]]
    want = math.sqrt(alpha_bar) * x_hat + math.sqrt(1 - alpha_bar) * noise + (x_hat if form == 2 else 0)
    torch.testing.assert_close(seen[0][0], want, rtol=1e-4, atol=1e-5)
    assert refined.shape == x_hat.shape and refined.abs().max() <= 1


def test_from_noise_it_is_the_refinement_of_a_diffusevae_and_without_steps_x_hat():
    model = hybrid(z_guidance=True)
    plain = DiffuseVAE(VECTOR, UNET, COSINE, z_guidance=True).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("latent.")})
    z = torch.randn(3, 4, generator=generator())
    x_hat = model.vae.decode(z).detach()
    own, other = (each.refine(x_hat, z, steps=3, generator=generator(), **more)
                  for each, more in ((model, {"start": 1.0}), (plain, {})))
    torch.testing.assert_close(own, other)
    assert torch.equal(model.refine(x_hat, z, steps=0), x_hat.clamp(-1, 1))


@pytest.mark.parametrize("make", [latent, hybrid])
def test_a_model_whose_codes_have_no_density_has_no_bound_on_its_likelihood(make):
    model = make("vector")
    with complains(type(model).__name__, "leave this study out"):
        STUDIES["likelihood"](model, Material(shapes(), shapes(split="test"), None, None))


def test_an_odd_width_has_no_sines_and_cosines():
    with pytest.raises(ValueError, match="width is 7: choose an even one"):
        ResidualMLP(4, width=7)


@kinds
def test_half_precision_changes_little_and_stays_finite(kind):
    for model in (latent(kind), hybrid(kind)):
        found = {}
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model.training_loss(images(), draws=Draws(0, 0))["loss"]
                found[enabled] = loss, model.sample(4, steps=3, generator=generator())
        assert found[True][0].dtype == found[True][1].dtype == torch.float32 and torch.isfinite(found[True][1]).all()
        torch.testing.assert_close(found[True][0], found[False][0], rtol=0.05, atol=0.05)
        assert (found[True][1] - found[False][1]).abs().mean() < 0.1


@pytest.mark.parametrize("start", [0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(start):
    model = hybrid()
    with pytest.raises(ValueError, match=f"start is {start:g}: choose a share above 0, up to 1"):
        model.sample(1, steps=2, start=start)


def test_training_a_hybrid_on_trains_its_prior_alone():
    model = hybrid().train()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"latent"}
    assert model.training_loss(images())["loss"].requires_grad
    again = build_model(json.loads(json.dumps(model.config)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="steps is 500: choose from 1 to 400"):
        hybrid().sample(1, steps=1, refine_steps=500)


def test_an_entry_without_training_is_put_together_from_trained_parts(tmp_path):
    tiny = {"kimg": 0.016, "batch_size": 8}
    small = {"image_size": 32, "z_dim": 4, "width": 4, "multipliers": [1, 2]}
    unet = {"image_size": 32, "width": 4, "multipliers": [1, 2], "attention": []}
    pair = {"model": "DiffuseVAE", "vae": small, "unet": unet}
    entries = [Entry("a", "shapes", {"model": "VAE", **small}, tiny, subset=40),
               Entry("b", "shapes", pair, tiny, subset=40, depends_on={"vae": "a"}),
               Entry("c", "shapes", {"model": "LatentDiffusion", "vae": small, "denoiser": MLP}, tiny, subset=40,
                     depends_on={"vae": "a"}),
               Entry("d", "shapes", pair | {"model": "LatentDiffuseVAE", "denoiser": MLP}, None, subset=40,
                     depends_on={"vae": "b", "unet": "b", "latent": "c"})]
    record = run_entry(entries[3], entries, tmp_path, cpu=True, progress=False)
    assert (record["kimg"], record["train_seconds"], record["history"]) == (0, 0, [])
    assert record["config"]["train"] is None
    assert not entries[3].missing(record)
    assert run_entry(entries[3], entries, tmp_path, cpu=True, progress=False) == record
    a, b, c, d = (load_model(tmp_path / "shapes-40" / name / "seed0" / "model.safetensors") for name in "abcd")
    for part, other in ((d.vae, a), (d.unet, b.unet), (d.latent, c.latent)):
        assert weights_hash(part) == weights_hash(other)
    assert record["depends_on"] == {"b": weights_hash(b), "c": weights_hash(c)}
    other = [Entry("e", "shapes", {"model": "VAE", **small}, tiny | {"lr": 1e-4}, subset=40),
             dataclasses.replace(entries[2], experiment="f", depends_on={"vae": "e"})]
    mixed = dataclasses.replace(entries[3], experiment="g", depends_on={"vae": "b", "unet": "b", "latent": "f"})
    with complains("g is put together from parts of different VAEs", "train its parts again"):
        run_entry(mixed, [*entries, *other, mixed], tmp_path, cpu=True, progress=False)
    assert d.latent.deviation.min() > 0 and not torch.equal(d.latent.deviation, torch.ones_like(d.latent.deviation))


# --- studies --------------------------------------------------------------------------------------------------------

def material(n=60):
    torch.manual_seed(0)
    network, test = FeatureNetwork(image_size=16, width=4, num_features=6).eval(), shapes(60, start=5_000, split="test")
    return Material(shapes(80), test, network, describe(network, test), n=n, batch=25)


@kinds
def test_the_reconstruction_limit_is_the_distance_of_training_images_and_of_their_reconstructions(kind):
    model, m = latent(kind), material()
    found = STUDIES["ceiling"](model, m)
    x = m.train.first(60).float()
    distance = lambda made: frechet_distance(describe(m.features, to_uint8(made)).features, m.heldout.features)
    assert found["n"] == 60 and set(found) == {"n", "images", "mean code", "drawn code"}
    assert found["images"]["FD"] == pytest.approx(distance(x), rel=1e-3)
    assert found["mean code"]["FD"] == pytest.approx(distance(model.vae.reconstruct(x)), rel=1e-3)
    assert found["drawn code"]["FD"] != found["mean code"]["FD"]


def test_the_reconstruction_limit_of_a_hybrid_is_also_measured_after_refinement():
    found = STUDIES["ceiling"](hybrid(), material(n=20))
    assert found["refined"]["FD"] != found["drawn code"]["FD"] and found["refined"]["FD"] > 0


def test_a_prior_that_fits_is_not_separated_from_codes_and_one_that_does_not_is():
    model, m = latent("vector"), material()
    model.latent.sample = lambda n, g, **_: 50 + randn((n, 4), g)  # far away
    model.vae.encode = lambda x: (torch.zeros(len(x), 4), torch.zeros(len(x), 4))  # codes are N(0, I)
    found = STUDIES["code_fit"](model, m)
    assert found["diffusion"]["accuracy"] > 0.95 and found["N(0, I)"]["accuracy"] < 0.75
    assert set(found) == {"n", "diffusion", "N(0, I)", "ex-pde", "realnvp"}
    assert found["diffusion"]["FD"] != found["N(0, I)"]["FD"]


# --- what a sample costs, and what is gained -----------------------------------------------------------------------

def record_of(model, fd, experiment="latent", seed=0, power=0.9, **asked):
    metrics = {"FD (shapes)": {"value": fd, "hash": asked.pop("hash", "a")},
               "FD (shapes) to training set": {"value": 0.0, "hash": "b"},
               "high-frequency power": {"value": power, "hash": None}}
    metrics = {k: m for k, m in metrics.items() if m["value"] is not None}
    evaluation = {"sampler": "dpmpp", "steps": 3, "n": 100, "nfe": 3, "metrics": metrics}
    return {"experiment": experiment, "dataset": "shapes", "seed": seed, "config": {"model": model.config},
            "evaluations": [evaluation | asked]}


def records_of(ours, pixels, experiment="latent", **asked):
    "Records of seeds 0, 1, ...: values of both as (FD, power)."
    own, other = latent("vector"), DiffuseVAE(VECTOR, UNET)
    return ([record_of(own, fd, experiment, seed, power, **asked) for seed, (fd, power) in enumerate(ours)]
            + [record_of(other, fd, "ddpm", seed, power) for seed, (fd, power) in enumerate(pixels)])


DDPM = [(9.0, 0.9), (10.0, 0.89), (11.0, 0.88)]


def timed(monkeypatch, seconds):
    "Times as if measured: (experiment, refine_steps) -> seconds per image, in three steps of DPM-Solver++."
    options = lambda k: {} if k is None else {"refine_steps": k}
    rows = [{"experiment": name, "evaluation": {"sampler": "dpmpp", "steps": 3} | options(k),
             "seconds_per_image": s} for (name, k), s in seconds.items()]
    monkeypatch.setattr("hybridvae.records.sampling_times", lambda dataset: rows)
    return rows


def test_the_operations_of_a_sample_are_those_of_its_parts():
    width, dim, blocks = 8, 4, 1
    block = 2 * width * width + 8 * width * width  # modulation, body
    macs = dim * width + 2 * width * width + blocks * block + width * dim  # stem, time, blocks, head
    model = latent("vector")
    decoder = count_flops(lambda: model.vae.decode(torch.zeros(1, 4)))
    assert sampling_flops(record_of(model, 1)) == 3 * 2 * macs + decoder
    both = hybrid()
    unet = count_flops(lambda: both.unet(torch.zeros(1, 3, 16, 16), torch.zeros(1), cond=torch.zeros(1, 3, 16, 16)))
    assert sampling_flops(record_of(both, 1, refine_steps=2)) == 3 * 2 * macs + decoder + 2 * unet
    assert sampling_flops(record_of(both, 1, refine_steps=5, start=1.0)) == 3 * 2 * macs + decoder + 5 * unet


@pytest.mark.parametrize("times, power, seconds, reached", [
    (1.15, 0.9, 0.09, True), (1.25, 0.9, 0.09, False),  # of the distance
    (0.5, 0.9, 0.11, False), (0.5, 0.9, 0.01, True),
    (0.5, 0.78, 0.01, True), (0.5, 0.7, 0.01, False),  # less power, and by how much
    (0.5, 1.3, 0.01, True), (0.5, 1.5, 0.01, False),  # more of it is as bad
])
def test_the_goal_asks_for_a_tenth_of_the_time_near_by_every_yardstick(times, power, seconds, reached, monkeypatch):
    timed(monkeypatch, {("latent", None): seconds, ("ddpm", None): 1.0})
    records = records_of([(times * fd, power) for fd, _ in DDPM], DDPM)
    found = gain(records, "latent", "ddpm")
    assert found["goal"] is reached and found["times less time"] == pytest.approx(1 / seconds)
    assert found["near"]["FD"] is (times < 1.2) and found["near"]["high-frequency power"] is (1 / 1.35 < power < 1.35)
    fds, powers = ({s: pair[i] for s, pair in enumerate(DDPM)} for i in (0, 1))
    assert found["values"]["FD"] == ({s: times * fd for s, fd in fds.items()}, fds)
    assert found["values"]["high-frequency power"] == (dict.fromkeys(range(3), power), powers)
    assert found["times fewer operations"] == pytest.approx(sampling_flops(records[-1]) / sampling_flops(records[0]))
    two = gain([r for r in records if r["seed"]], "latent", "ddpm")  # two seeds decide nothing
    assert two["near"] == {"FD": None, "high-frequency power": None} and two["goal"] is not True
    assert gain(records, "latent", "nothing") is None and gain(records, "nothing", "ddpm") is None


@pytest.mark.parametrize("power", [0.0, 0.03, 0.3, 0.65, None])
def test_a_model_without_texture_never_reaches_the_goal(power, monkeypatch):
    "However fast it is, and however small its FD, which does not see texture."
    timed(monkeypatch, {("latent", None): 1e-6, ("ddpm", None): 1.0})
    found = gain(records_of([(0.1 * fd, power) for fd, _ in DDPM], DDPM), "latent", "ddpm")
    assert found["near"]["FD"] is True and found["goal"] is (None if power is None else False)


def test_what_the_seeds_do_not_decide_stays_open(monkeypatch):
    timed(monkeypatch, {("latent", None): 0.01, ("ddpm", None): 1.0})
    found = gain(records_of([(4.0, 0.9), (15.0, 0.89), (9.0, 0.88)], DDPM), "latent", "ddpm")  # nearer in the mean
    assert found["near"] == {"FD": None, "high-frequency power": True} and found["goal"] is None


def test_a_recorded_texture_distance_is_a_yardstick_too(monkeypatch):
    timed(monkeypatch, {("latent", None): 0.01, ("ddpm", None): 1.0})
    records = records_of([(fd, p) for fd, p in DDPM], DDPM)
    assert gain(records, "latent", "ddpm")["goal"] is True
    for r in records:
        value = 5.0 + r["seed"] + 20 * (r["experiment"] == "latent")
        r["evaluations"][0]["metrics"]["texture distance"] = {"value": value, "hash": None}
    found = gain(records, "latent", "ddpm")
    assert found["near"]["texture distance"] is False and found["goal"] is False


def test_fewer_steps_of_the_pixel_model_take_less_time(monkeypatch):
    rows = timed(monkeypatch, {("latent", None): 0.01, ("ddpm", None): 0.3})
    rows.append(rows[1] | {"evaluation": {"sampler": "dpmpp", "steps": 1}, "seconds_per_image": 0.05})
    records = records_of(DDPM, DDPM)
    main, few = (gain(records, "latent", "ddpm", steps=steps) for steps in (None, 1))
    assert (main["times less time"], few["times less time"]) == pytest.approx((30, 5))
    assert (main["goal"], few["goal"]) == (True, False)
    assert main["times fewer operations"] > 2 * few["times fewer operations"] and main["values"] == few["values"]


def test_a_gain_is_that_of_the_evaluation_asked_for(monkeypatch):
    timed(monkeypatch, {("latent-hybrid", 4): 0.5, ("latent-hybrid", 1): 0.1, ("ddpm", None): 1.0})
    ours = record_of(hybrid(), 2.0, "latent-hybrid", refine_steps=4)
    first = ours["evaluations"][0]
    metrics = {"FD (shapes)": {"value": 7.0, "hash": "a"}}
    ours["evaluations"] += [first | {"prior": "own", "refine_steps": 1},
                            first | {"refine_steps": 1, "metrics": metrics}]
    records = [ours, record_of(DiffuseVAE(VECTOR, UNET), 2.0, "ddpm")]
    asked = {"main": {}, 4: {"refine_steps": 4}, 1: {"refine_steps": 1}}
    found = {k: gain(records, "latent-hybrid", "ddpm", **options) for k, options in asked.items()}
    assert {k: v["times less time"] for k, v in found.items()} == pytest.approx({"main": 2, 4: 2, 1: 10})
    assert [found[k]["values"]["FD"][0] for k in (4, 1)] == [{0: 2.0}, {0: 7.0}]
    assert gain(records, "latent-hybrid", "ddpm", refine_steps=2) is None
    assert found[1]["times fewer operations"] > 2 * found[4]["times fewer operations"]


def test_without_a_time_there_is_no_gain_in_time_and_no_goal(monkeypatch):
    timed(monkeypatch, {("latent", None): 0.1})
    found = gain(records_of(DDPM, DDPM), "latent", "ddpm")
    assert found["times less time"] is None and found["goal"] is None


# --- the lesson's sentences ------------------------------------------------------------------------------------------

LESSON = Path(__file__).parents[1] / "nbs" / "04_latent_diffusion.ipynb"


def sentence(records, family=None):
    "The sentence that the lesson's `in_words` makes of these records."
    sources = ["".join(c["source"]) for c in json.loads(LESSON.read_text())["cells"]]
    kinds = {"FD": "FD", "texture distance": "texture distance",
             "high-frequency power": "sharpness: high-frequency power"}
    pairs = {f"latent against ddpm, {kind}": tuple(values_of(records, name, kind) for name in ("latent", "ddpm"))
             for kind in kinds}
    names = {"gain": gain, "RECORDS": {"shapes": records}, "HybridVAEError": HybridVAEError, "KINDS": kinds,
             "FEWEST": 1, "TIMES_LESS": TIMES_LESS, "mean_and_spread": mean_and_spread,
             "FAMILY": {"shapes": paired_family(pairs)}}
    for function in ("compared", "goal_in_words", "in_time", "in_words"):
        [source] = [s for s in sources if f"def {function}(" in s]
        exec(source, names)
    return names["in_words"]("shapes", "latent", "ddpm")


def test_sentences_on_a_gain_do_without_a_time(monkeypatch):
    timed(monkeypatch, {})
    said = sentence(records_of(DDPM, DDPM))
    assert "time not measured" in said and "nan" not in said
    assert "goal open (FD kept, sharpness kept, time open)" in said


def test_a_sentence_has_lower_only_where_the_interval_leaves_out_zero(monkeypatch):
    timed(monkeypatch, {("latent", None): 0.01, ("ddpm", None): 1.0})
    rng = np.random.default_rng(0)
    seen = set()
    for shift in (0.0, 1.0, 3.0, 30.0):
        ours = [(fd - shift + rng.normal(), p) for fd, p in DDPM]
        result = paired({s: fd for s, (fd, _) in enumerate(ours)}, {s: fd for s, (fd, _) in enumerate(DDPM)})
        said = sentence(records_of(ours, DDPM)).split(";")[0]
        seen.add("(lower)" in said)
        assert ("(lower)" in said) <= (result.high < 0) and ("within ±" in said) == ("(lower)" not in said)
    assert seen == {True, False}


def test_the_sentence_names_both_yardsticks_and_calls_one_seed_no_claim(monkeypatch):
    timed(monkeypatch, {("latent", None): 0.01, ("ddpm", None): 1.0})
    blurred = sentence(records_of([(0.1 * fd, 0.03 + 0.001 * s) for s, (fd, _) in enumerate(DDPM)], DDPM))
    assert "sharpness 0.03" in blurred and "goal missed (FD kept, sharpness missed, time open)" in blurred
    one = sentence(records_of([(1.0, 0.03)], DDPM[:1]))
    assert one.count("one seed, not a claim") == 2 and "goal open" in one


@pytest.mark.parametrize("asked", [{"steps": 4}, {"sampler": "ddim"}, {"n": 50}, {"hash": "c"}], ids=str)
def test_what_was_measured_otherwise_is_not_compared(asked):
    records = [record_of(latent("vector"), 1), record_of(latent("vector"), 1, "ddpm", **asked)]
    with complains("latent and ddpm", "evaluate them alike"):
        gain(records, "latent", "ddpm")


# --- entries --------------------------------------------------------------------------------------------------------

DATASETS = ("shapes", "scenes", "cifar10", "celeba64", "celeba256")
BESIDE = {"shapes": {"latent-long", "latent-mlp"}, "scenes": {"latent-x0"}}  # the core


@pytest.mark.parametrize("dataset", DATASETS)
def test_entries_are_fair(dataset):
    entries = {e.experiment: e for e in queue(dataset) if e.seed == 0}
    ours = {e.experiment: e for e in entries_of(dataset, "latent") if e.seed == 0 and not e.experiment.endswith("-cpu")}
    core = {"latent-vae", "latent", "latent-mlp-long", "latent-hybrid"}
    assert set(ours) == core | BESIDE.get(dataset, set())
    pixel = entries["ddpm"]
    for name in ours.keys() & {"latent", "latent-mlp"}:  # equal images, the same sampler, steps and number of images
        assert ours[name].train == pixel.train and ours[name].evaluations[0] == pixel.evaluations[0]
    assert all(e.train["kimg"] > pixel.train["kimg"] for name, e in ours.items() if name.endswith("-long"))
    assert all(name in entries for e in ours.values() for name in e.depends_on.values())
    assert all(e.evaluations[0]["n"] == pixel.evaluations[0]["n"] for e in ours.values())
    refined = [e.get("refine_steps") for e in ours["latent-hybrid"].evaluations]
    assert {1, 2, 4} < set(refined) and ours["latent-hybrid"].train is None


@pytest.mark.parametrize("dataset, shape", [("shapes", (4, 8, 8)), ("cifar10", (4, 8, 8)),
                                            ("celeba64", (4, 16, 16)), ("celeba256", (4, 32, 32))])
def test_codes_have_the_sizes_that_are_named_and_parts_fit_together(dataset, shape):
    entries = {e.experiment: e for e in entries_of(dataset, "latent") if e.seed == 0}
    assert build_model(entries["latent"].model).vae.code_shape == shape
    everything = {e.experiment: e for e in queue(dataset) if e.seed == 0}
    entry = entries["latent-hybrid"]
    model = build_model(entry.model)
    for attribute, parent in entry.depends_on.items():
        part = getattr(build_model(everything[parent].model), attribute)
        shapes_of = lambda network: {k: v.shape for k, v in network.state_dict().items()}
        assert shapes_of(getattr(model, attribute)) == shapes_of(part)
    assert model.latent.diffusion.config == build_model(everything[entry.depends_on["latent"]].model).diffusion.config
    assert dataclasses.replace(entries["latent"], seed=1).config == entries["latent"].config


def test_three_seeds_where_claims_are_made():
    for dataset in DATASETS:
        entries, names = entries_of(dataset, "latent"), ("latent", "latent-mlp-long", "latent-hybrid")
        seeds = {name: [e.seed for e in entries if e.experiment == name] for name in names}
        assert all(found == [0] if dataset == "celeba256" else found[:3] == [0, 1, 2] for found in seeds.values())


def test_the_process_of_codes_predicts_v_whatever_that_of_pixels_does():
    for entry in entries_of(stage="latent"):
        process = entry.model.get("latent_diffusion") or entry.model.get("diffusion")
        assert process is None or (process["prediction"] == "v") == (entry.experiment != "latent-x0")
    assert next(e for e in entries_of("scenes") if e.experiment == "ddpm").model["diffusion"]["prediction"] == "x0"


def test_the_lesson_names_only_experiments_that_exist():
    text = "".join("".join(c["source"]) for c in json.loads(LESSON.read_text())["cells"])
    known = {e.experiment for e in entries_of()}
    names = r"\blatent(?:-(?:vae|mlp|form\d|hybrid|long|x0|free|tight|coarse|spatial|512))+\b"
    assert {"latent-mlp-long", "latent-hybrid"} <= set(re.findall(names, text)) <= known
