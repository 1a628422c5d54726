"""DiffuseVAE: the two forms, condition and code, dropped conditions and guidance, the frozen VAE, and the studies."""
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae import campaign
from hybridvae.core import Draws, Model, config_hash, image_draws, load_model, save_model, to_uint8
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffusersVAE, DiffuseVAE, attribute_direction, convert_form
from hybridvae.experiments import entries_of
from hybridvae.features import FeatureNetwork
from hybridvae.metrics import describe, slerp
from hybridvae.priors import GaussianMixture, StandardNormal
from hybridvae.runs import STUDIES, Material
from hybridvae.training import Average, TrainConfig, train
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from safetensors.torch import load_file

VAE_CONFIG = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
ALL_VARIANTS = pytest.mark.parametrize("form, z_guidance, concat", [
    (form, z_guidance, concat) for form in (1, 2) for z_guidance in (False, True) for concat in (True, False)])
SAMPLERS = pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp"])


pytestmark = pytest.mark.usefixtures("double_precision")


def model(form=1, z_guidance=False, concat=True, unet=None, diffusion=None, cond_dropout=0.0):
    "A DiffuseVAE with random weights."
    m = DiffuseVAE(VAE_CONFIG, {**UNET, **(unet or {})}, diffusion, form, z_guidance, concat, cond_dropout)
    return randomised(m, scale=0.3)


def with_weights_of(other, **changes):
    "Another variant with the very same weights."
    config = {**other.config, **changes}
    twin = DiffuseVAE.from_config(config).eval()
    twin.load_state_dict(other.state_dict())
    return twin


def images(n=4, seed=1):
    return torch.rand(n, 3, 16, 16, generator=generator(seed)) * 2 - 1


def codes(n=4, seed=2):
    return torch.randn(n, 4, generator=generator(seed))


def loss(m, x=None, step=0):
    return m.training_loss(images() if x is None else x, draws=Draws(0, step))["loss"]


def refined(m, x_hat=None, z=None, seed=0, sampler="dpmpp", steps=6, **options):
    return m.refine(images() if x_hat is None else x_hat, codes() if z is None else z, sampler=sampler, steps=steps,
                    generator=generator(seed), **options)


# --- the two forms --------------------------------------------------------------------------------------------------

PAPER = dict(schedule="linear", prediction="eps", weighting="simple")
CONVERTED = pytest.mark.parametrize("form, z_guidance, unet, diffusion", [
    (1, False, {}, None), (2, False, {}, None), (1, True, {}, PAPER),
    (2, True, dict(patch=2, attention=(4,)), dict(prediction="x0"))],
    ids=["1 to 2", "2 to 1", "1 to 2, noise, z", "2 to 1, patches, z"])


@CONVERTED
def test_converted_weights_give_the_same_losses_in_the_other_form(form, z_guidance, unet, diffusion):
    one = model(form, z_guidance, unet=unet, diffusion=diffusion)
    other = convert_form(one)
    assert (one.form, other.form) == (form, 3 - form)
    for step in range(3):
        torch.testing.assert_close(loss(other, step=step), loss(one, step=step), rtol=1e-9, atol=0)


@SAMPLERS
@CONVERTED
def test_converted_weights_give_the_same_samples_in_the_other_form(form, z_guidance, unet, diffusion, sampler):
    one = model(form, z_guidance, unet=unet, diffusion=diffusion)
    # clipping hides differences, so it is off; unclipped values of random networks are large, so the bound is relative
    a, b = (refined(m, sampler=sampler) for m in (one, convert_form(one)))
    assert (a.abs() < 1).double().mean() > 0.1  # clipping does not hide a difference
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_without_conversion_the_same_weights_are_another_model():
    one = model(1)
    twin = with_weights_of(one, form=2)
    assert (refined(one) - refined(twin)).abs().mean() > 0.01 and abs(loss(one) / loss(twin) - 1) > 1e-3


def test_converting_there_and_back_changes_nothing_but_rounding_and_leaves_the_first_alone():
    one = model(1)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    back = convert_form(convert_form(one))
    assert back.config == one.config
    for name, value in before.items():
        assert torch.equal(one.state_dict()[name], value)
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=1e-15)


def test_only_the_weights_that_see_the_coarse_image_differ():
    one = model(1)
    other, before = convert_form(one), one.state_dict()
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"unet.stem.weight"}
    assert torch.equal(other.unet.stem.weight[:, :3], one.unet.stem.weight[:, :3])


def test_without_concatenation_there_is_nothing_to_convert():
    with pytest.raises(ValueError, match="concat=True"):
        convert_form(model(1, concat=False))


def test_form_2_without_concatenation_knows_the_coarse_image_by_the_shift_only():
    two, one = model(2, concat=False), with_weights_of(model(2, concat=False), form=1)
    x_hat = images(seed=5)
    assert two.unet.cond_channels == 0
    assert (refined(two, x_hat) - refined(model(2), x_hat)).abs().mean() > 0.01  # another model than with concatenation
    assert (refined(two, x_hat) - refined(two, -x_hat)).abs().mean() > 0.01  # the shift reaches the network
    assert torch.equal(refined(one, x_hat), refined(one, -x_hat))  # without shift and concatenation nothing does


@pytest.mark.parametrize("form", [0, 3, "1"])
def test_other_forms_are_refused(form):
    with pytest.raises(ValueError, match="choose 1 or 2"):
        DiffuseVAE(VAE_CONFIG, UNET, form=form)


def test_the_loss_of_form_2_is_that_of_the_shifted_process():
    "Written out: x_t = √ᾱ x₀ + x̂ + √(1-ᾱ) ε is what the network sees, beside x̂, and ε what it is to say."
    m = model(2, diffusion=PAPER)
    x, draws = images(), Draws(0, 0)
    mu, logvar = m.vae.encode(x)
    x_hat = m.vae.decode(mu + logvar.mul(0.5).exp() * draws.randn(4, 4))
    t = draws.randint(1000, 4)
    eps = draws.randn(4, 3, 16, 16)
    abar = torch.tensor(m.diffusion.alphas_cumprod)[t][:, None, None, None]
    seen = abar.sqrt() * x + x_hat + (1 - abar).sqrt() * eps
    want = (m.unet(seen, t, x_hat) - eps).square().mean()
    torch.testing.assert_close(loss(m), want, rtol=1e-6, atol=0)  # its weights are float32


# --- what the condition and the code do -----------------------------------------------------------------------------

@pytest.mark.parametrize("form", [1, 2])
def test_another_coarse_image_gives_another_refinement(form):
    m = model(form)
    a, b = refined(m, images(seed=5)), refined(m, images(seed=6))
    assert (a - b).abs().flatten(1).mean(dim=1).min() > 0.01
    assert torch.equal(a, refined(m, images(seed=5)))  # the same noise both times: only x̂ made the difference


@pytest.mark.parametrize("form", [1, 2])
def test_each_refinement_belongs_to_its_own_coarse_image(form):
    m, x_hat = model(form), images(seed=5)
    x_hat[2:] += 0.5
    after, before = refined(m, x_hat), refined(m, images(seed=5))
    torch.testing.assert_close(after[:2], before[:2], rtol=1e-9, atol=1e-9)
    assert (after[2:] - before[2:]).abs().flatten(1).mean(dim=1).min() > 1e-3


@pytest.mark.parametrize("form", [1, 2])
def test_shuffled_coarse_images_change_the_loss(form):
    m = model(form)
    honest, condition = loss(m), m.draw_coarse

    def shuffled(x, draws):
        return tuple(v.roll(1, 0) for v in condition(x, draws))
    m.draw_coarse = shuffled
    assert abs(loss(m) / honest - 1) > 1e-3


def test_the_condition_is_drawn_and_not_the_mean():
    m, x = model(1), images()
    x_hat, z = m.draw_coarse(x, Draws(0, 0))
    again, other = (m.draw_coarse(x, Draws(0, step))[0] for step in (0, 1))
    assert torch.equal(x_hat, m.vae.decode(z)) and torch.equal(x_hat, again) and not torch.allclose(x_hat, other)
    mu, logvar = m.vae.encode(x)
    many = torch.stack([m.draw_coarse(x, Draws(0, step))[1] for step in range(400)])
    deviation = (0.5 * logvar).exp()
    assert ((many.mean(dim=0) - mu).abs() < 5 * deviation / 20).all()
    torch.testing.assert_close(many.std(dim=0), deviation, rtol=0.2, atol=0)


@pytest.mark.parametrize("form", [1, 2])
def test_the_code_guides_where_it_is_asked_to_and_nowhere_else(form):
    guided, plain = model(form, z_guidance=True), model(form)
    x_hat = images(seed=5)
    for k in range(4):
        z = codes()
        z[:, k] += 1
        assert (refined(guided, x_hat, z) - refined(guided, x_hat)).abs().flatten(1).mean(dim=1).min() > 1e-3
        assert torch.equal(refined(plain, x_hat, z), refined(plain, x_hat))


@ALL_VARIANTS
def test_gradients_reach_every_trained_parameter_and_no_other(form, z_guidance, concat):
    m = model(form, z_guidance, concat).train()
    loss(m).backward()
    for name, p in m.named_parameters():
        if name.startswith("vae."):
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad is not None and p.grad.abs().max() > 0, name


# --- sampling -------------------------------------------------------------------------------------------------------

@SAMPLERS
@ALL_VARIANTS
def test_samples_have_shape_and_range_and_follow_the_generator(form, z_guidance, concat, sampler):
    m = model(form, z_guidance, concat)
    draw = lambda seed: m.sample(3, sampler=sampler, steps=3, generator=generator(seed))
    x = draw(0)
    assert x.shape == (3, 3, 16, 16) and x.abs().max() <= 1 and x.isfinite().all() and not x.requires_grad
    assert torch.equal(x, draw(0)) and not torch.equal(x, draw(1))


def test_pairs_are_a_decoded_draw_of_the_prior_and_its_refinement():
    m = model(2, z_guidance=True)
    x_hat, x = m.sample_pairs(3, steps=4, generator=generator(7))
    g = generator(7)
    z = m.vae.prior.sample(3, g)
    assert torch.equal(x_hat, m.vae.decode(z)) and torch.equal(x, m.refine(x_hat, z, steps=4, generator=g))
    assert torch.equal(x, m.sample(3, steps=4, generator=generator(7)))


@pytest.mark.parametrize("n, side", [(100, 10), (25, 5)])
def test_pictures_beside_a_record_are_samples_and_rows_of_coarse_images_above_their_refinements(n, side):
    m = model(1)
    x_hat, x = m.sample_pairs(n, sampler="ddim", steps=2, generator=generator(7))
    shown = m.showcase(n, generator(7), sampler="ddim", steps=2)
    assert set(shown) == {"", "pairs"} and torch.equal(shown[""], x)
    rows = shown["pairs"].reshape(-1, side, 3, 16, 16)  # as a grid of that many columns shows them
    half = side * len(rows) // 2
    assert half >= side and torch.equal(rows[0::2].flatten(0, 1), x_hat[:half])
    assert torch.equal(rows[1::2].flatten(0, 1), x[:half])


def test_paths_lead_from_the_code_of_one_image_to_that_of_another_under_one_noise():
    m, ends = model(z_guidance=True), images(4)
    rows = m.paths(ends, 5, generator(7), sampler="ddim", steps=2)["paths"].reshape(2, 2, 5, 3, 16, 16)
    z, noise = m.vae.encode(ends)[0], torch.randn(1, 3, 16, 16, generator=generator(7))
    for way, (a, b) in zip(rows, (z[:2], z[2:])):
        middle = slerp(a[None], b[None], 0.5)
        for place, code in ((0, a[None]), (2, middle), (4, b[None])):
            x_hat = m.vae.decode(code)
            torch.testing.assert_close(way[0, place:place + 1], x_hat)
            torch.testing.assert_close(way[1, place:place + 1],
                                       m.refine(x_hat, code, noise=noise, sampler="ddim", steps=2))


@pytest.mark.parametrize("form", [1, 2])
def test_sampling_starts_at_the_noise_the_form_says(form):
    m, x_hat, seen = model(form), images(seed=5), []
    m.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    m.refine(x_hat, steps=2, generator=generator(3))
    noise = torch.randn(x_hat.shape, generator=generator(3))
    torch.testing.assert_close(seen[0], noise + (x_hat if form == 2 else 0))  # N(x̂, I) or N(0, I)


class FixedPrior:
    "Always the same codes."

    def sample(self, n, generator=None):
        return codes(n, seed=11)


def test_a_prior_that_is_given_replaces_the_models_own():
    m = model(2, z_guidance=True)
    x_hat, x = m.sample_pairs(3, prior=FixedPrior(), steps=2, generator=generator(7))
    assert torch.equal(x_hat, m.vae.decode(codes(3, seed=11)))
    assert torch.equal(x, m.refine(x_hat, codes(3, seed=11), steps=2, generator=generator(7)))
    assert torch.equal(x, m.sample(3, prior=FixedPrior(), steps=2, generator=generator(7)))
    assert torch.equal(m.vae.sample(3, prior=FixedPrior()), m.vae.decode(codes(3, seed=11)).clamp(-1, 1))
    assert not torch.equal(x, m.sample(3, steps=2, generator=generator(7)))


def test_ex_pde_is_a_mixture_fitted_to_codes_of_the_training_images():
    m = model(1)
    options = m.sampling_options({"prior": "ex-pde", "steps": 2}, shapes(60))
    assert options["steps"] == 2 and isinstance(options["prior"], GaussianMixture)
    mu = m.vae.encode(shapes(60).float())[0]
    drawn = options["prior"].sample(2000, generator())
    assert ((drawn.mean(dim=0) - mu.mean(dim=0)).abs() < 0.5 * m.vae.codes(shapes(60)).std(dim=0)).all()
    assert m.sampling_options({"steps": 2}, None) == {"steps": 2}


@pytest.mark.parametrize("form", [1, 2])
def test_a_reconstruction_refines_the_image_decoded_from_the_mean_code(form):
    m, x = model(form, z_guidance=True), images()
    x_hat, again = m.reconstruct(x, steps=3, generator=generator(5))
    assert torch.equal(x_hat, m.vae.reconstruct(x))
    assert torch.equal(again, m.refine(x_hat, m.vae.encode(x)[0], steps=3, generator=generator(5)))


@pytest.mark.parametrize("form", [1, 2])
def test_a_path_of_codes_keeps_the_noise_and_a_path_of_noises_keeps_the_coarse_image(form):
    m, noise = model(form, z_guidance=True), torch.randn(2, 3, 16, 16, generator=generator(9))
    ends = codes(2)
    path = slerp(ends[:1].expand(5, -1), ends[1:].expand(5, -1), torch.linspace(0, 1, 5))
    x_hat, x = m.interpolate(path, noise[:1], steps=3)
    torch.testing.assert_close(x_hat[[0, 4]], m.vae.decode(ends))
    want = m.refine(m.vae.decode(ends), ends, noise=noise[:1].expand(2, -1, -1, -1), steps=3)
    torch.testing.assert_close(x[[0, 4]], want)
    assert (x[0] - x[2]).abs().mean() > 1e-3
    noises = slerp(noise[:1].expand(5, -1, -1, -1), noise[1:].expand(5, -1, -1, -1), torch.linspace(0, 1, 5))
    x_hat, x = m.interpolate(ends[:1], noises, steps=3)
    torch.testing.assert_close(x_hat, x_hat[:1].expand_as(x_hat))
    want = m.refine(x_hat[:2], ends[:1].expand(2, -1), noise=noise, steps=3)
    torch.testing.assert_close(x[[0, 4]], want)
    assert (x[0] - x[2]).abs().mean() > 1e-3


# --- dropped conditions and guidance --------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_named_share_of_images_is_trained_on_without_condition_code_and_shift(form, share):
    n, m, seen = 400, model(form, z_guidance=True, cond_dropout=share), {}
    x, x_hat, z = images(n), 1 + images(n, seed=5).abs(), 1 + codes(n).abs()
    m.draw_coarse = lambda x, draws: (x_hat, z)
    m.unet.forward = lambda x_t, t, cond, z: seen.update(x_t=x_t, cond=cond, z=z) or x_t
    q_sample = m.diffusion.q_sample

    def spy(x0, t, eps, shift=None):
        seen["unshifted"] = q_sample(x0, t, eps)
        return q_sample(x0, t, eps, shift)
    m.diffusion.q_sample = spy
    loss(m, x)
    dropped = seen["cond"].abs().amax(dim=(1, 2, 3)) == 0
    assert abs(dropped.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / n)
    kept = ~dropped
    assert (seen["z"][dropped] == 0).all()
    assert torch.equal(seen["z"][kept], z[kept]) and torch.equal(seen["cond"][kept], x_hat[kept])
    assert torch.equal(seen["x_t"][dropped], seen["unshifted"][dropped])
    want = seen["unshifted"][kept] + (x_hat[kept] if form == 2 else 0)
    torch.testing.assert_close(seen["x_t"][kept], want)


class CountedDraws(Draws):
    "Draws that keep a list of what was asked of them."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def rand(self, *shape):
        self.asked.append(("rand", shape))
        return super().rand(*shape)


def test_without_dropping_nothing_is_drawn_for_it_and_the_loss_is_that_of_before():
    plain = model(2, z_guidance=True)
    config = {k: v for k, v in plain.config.items() if k != "cond_dropout"}
    before = DiffuseVAE.from_config(config).eval()
    before.load_state_dict(plain.state_dict())
    draws = CountedDraws(0, 0)
    assert torch.equal(plain.training_loss(images(), draws=draws)["loss"], loss(before)) and draws.asked == []
    dropping, draws = with_weights_of(plain, cond_dropout=0.5), CountedDraws(0, 0)
    assert dropping.training_loss(images(), draws=draws)["loss"] != loss(before) and draws.asked == [("rand", (4,))]


GUIDED = pytest.mark.parametrize("form, z_guidance, concat", [
    (1, False, True), (1, True, True), (2, False, True), (2, True, True), (2, True, False)])


@GUIDED
def test_guidance_of_weight_one_is_the_plain_model(form, z_guidance, concat):
    m = model(form, z_guidance, concat, cond_dropout=0.1)
    assert torch.equal(refined(m, guidance_weight=1.0), refined(with_weights_of(m, cond_dropout=0.0)))


@GUIDED
def test_guidance_of_weight_zero_is_the_model_without_any_condition(form, z_guidance, concat):
    m = model(form, z_guidance, concat, cond_dropout=0.1)
    noise = torch.randn(4, 3, 16, 16, generator=generator(3))
    nothing = lambda x, t: m.unet(x, t, cond=torch.zeros_like(x), z=torch.zeros(4, 4))
    want = m.diffusion.sample(nothing, noise, "dpmpp", 6).clamp(-1, 1)  # and without a shift
    for seed in (5, 6):  # whatever the condition is
        found = refined(m, images(seed=seed), codes(seed=seed), noise=noise, guidance_weight=0.0)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@GUIDED
def test_a_guided_prediction_moves_on_a_line_with_the_weight(form, z_guidance, concat):
    m, x_hat, z = model(form, z_guidance, concat, cond_dropout=0.1), images(seed=5), codes()
    x_t, t = images(seed=6), torch.tensor([3, 300, 600, 999])
    predict = lambda weight: m.guided(x_hat, z, weight)(x_t, t)
    free, led = predict(0.0), predict(1.0)
    assert (free - led).abs().mean() > 1e-3
    for weight in (-0.5, 0.5, 1.5, 4.0):
        torch.testing.assert_close(predict(weight), (1 - weight) * free + weight * led, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_converted_weights_give_the_same_guided_samples(form, weight):
    one = model(form, z_guidance=True, cond_dropout=0.1)
    a, b = (refined(m, guidance_weight=weight) for m in (one, convert_form(one)))
    assert (a.abs() < 1).double().mean() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_model_that_never_missed_its_condition_cannot_be_guided():
    with pytest.raises(ValueError, match="trained without cond_dropout"):
        refined(model(1), guidance_weight=1.5)
    with pytest.raises(ValueError, match="give the codes"):
        model(1, z_guidance=True).refine(images(), steps=1)


# --- the frozen VAE -------------------------------------------------------------------------------------------------

def short_training(folder, seed=0):
    factors = shapes_factors(range(16))
    torch.manual_seed(seed)
    m = DiffuseVAE(VAE_CONFIG, dict(UNET, dropout=0.2), form=2, z_guidance=True)
    before = {name: value.clone() for name, value in m.state_dict().items()}
    config = TrainConfig(kimg=0.04, batch_size=8, lr=1e-2, weight_decay=0.1, n_slices=1, precision="fp32")  # 5 steps
    train(m, ImageData("shapes", "train", draw_shapes(factors, 16), factors), config, folder, progress=False, cpu=True)
    return m, before


def test_the_vae_stays_as_it_was_through_training_and_everything_else_moves(tmp_path):
    m, before = short_training(tmp_path)
    for name, value in m.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("vae."), name


def test_the_vae_is_in_the_checkpoint_but_in_neither_average_nor_optimiser(tmp_path):
    m, before = short_training(tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    state = load_file(checkpoint / "state.safetensors")
    assert {"optimizer/unet.stem.weight/exp_avg", "average/unet.stem.weight"} <= state.keys()
    assert not [key for key in state if "vae." in key]
    assert all(name.startswith("unet.") for name in Average(m).values)
    back = load_model(checkpoint / "model.safetensors")  # self-contained
    assert all(torch.equal(value, before[name]) for name, value in back.state_dict().items() if name.startswith("vae."))
    a, b = (each.sample(2, steps=2, generator=generator()) for each in (back, m))
    torch.testing.assert_close(a, b)


def test_the_vae_stays_frozen_and_in_evaluation_mode():
    m = DiffuseVAE(VAE_CONFIG, UNET)
    for call in (lambda: m, lambda: m.train(), lambda: m.train(False), lambda: m.train(), lambda: m.eval()):
        call()
        assert not any(part.training for part in m.vae.modules())
        assert not any(p.requires_grad for p in m.vae.parameters())
        assert all(p.requires_grad for p in m.unet.parameters())
    m.train()
    assert m.training and m.unet.training


def test_a_trained_vae_comes_with_its_weights(tmp_path):
    "A DiffuseVAE takes a VAE's config; its weights are loaded into `vae`, and the file then holds both."
    vae = randomised(VAE(**VAE_CONFIG))
    m = DiffuseVAE(vae.config, UNET)
    m.vae.load_state_dict(vae.state_dict())
    back = load_model(save_model(m, tmp_path / "m.safetensors"))
    x = images()
    assert back.config == m.config and torch.equal(back.vae.reconstruct(x), vae.reconstruct(x))
    assert not any(p.requires_grad for p in back.vae.parameters())


# --- another model in the VAE's place -------------------------------------------------------------------------------

class LinearVAE(Model):
    "The least that keeps the contract of `CoarseModel`."

    def __init__(self, z_dim=5):
        super().__init__()
        self.config = {"model": type(self).__name__, "z_dim": z_dim}
        self.image_shape, self.z_dim, self.code_shape, self.prior = (3, 16, 16), z_dim, (z_dim,), StandardNormal(z_dim)
        self.to_code, self.to_image = torch.nn.Linear(768, z_dim), torch.nn.Linear(z_dim, 768)

    def encode(self, x):
        mu = self.to_code(x.flatten(1))
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        return self.to_image(z).unflatten(1, self.image_shape)


def diffusers_vae():
    pytest.importorskip("diffusers")
    return DiffusersVAE(16, latent_channels=2, block_out_channels=[8, 8], norm_num_groups=4,
                        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)


@pytest.mark.parametrize("make", [LinearVAE, diffusers_vae, lambda: VAE(**VAE_CONFIG)],
                         ids=["linear", "diffusers", "VAE"])
def test_any_model_that_keeps_the_contract_takes_the_vaes_place(make, tmp_path):
    vae = make().double()
    m = randomised(DiffuseVAE(vae, UNET, form=2, z_guidance=True), scale=0.3)
    assert m.vae is vae and m.unet.config["z_dim"] == vae.z_dim == math.prod(vae.code_shape)
    loss(m).backward()
    assert all(p.grad is None for p in vae.parameters()) and any(p.grad is not None for p in m.unet.parameters())
    assert m.train().training and not vae.training
    x_hat, again = m.reconstruct(images(), steps=2, generator=generator())
    assert torch.equal(x_hat, vae.decode(vae.encode(images())[0])) and again.shape == x_hat.shape
    back = load_model(save_model(m, tmp_path / "m.safetensors"))
    assert type(back.vae) is type(vae) and back.config == json.loads(json.dumps(m.config))
    a, b = (each.sample(2, steps=2, generator=generator()) for each in (m, back))
    torch.testing.assert_close(a, b)


def test_what_does_not_keep_the_contract_is_refused():
    with complains("Linear", "no config, image_shape, z_dim, code_shape, prior, encode, decode"):
        DiffuseVAE(torch.nn.Linear(1, 1), UNET)
    unnamed, plain = LinearVAE(), torch.nn.Module()
    for name in ("config", "image_shape", "z_dim", "code_shape", "prior", "encode", "decode"):
        setattr(plain, name, getattr(unnamed, name))
    unnamed.config = {"z_dim": 5}
    for vae in (unnamed, plain):
        with complains(type(vae).__name__, "could not be saved"):
            DiffuseVAE(vae, UNET)


def test_what_only_a_vae_can_do_is_refused_for_another_model():
    m = DiffuseVAE(LinearVAE(), UNET)
    with complains("LinearVAE", "fitted_prior"):
        m.sampling_options({"prior": "ex-pde"}, shapes())
    assert m.sampling_options({"steps": 2}, shapes()) == {"steps": 2}
    with complains("LinearVAE", "likelihood_bound"):
        m.likelihood_bound(images(), Draws(0, 0))


# --- attributes and studies -----------------------------------------------------------------------------------------

def shapes(n=40, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, 16), factors)


def test_an_attributes_direction_is_the_difference_of_mean_codes():
    m, data = model().vae, shapes(30)
    mask = data.labels[:, 0] == 0
    mu = m.encode(data.float())[0]
    torch.testing.assert_close(attribute_direction(m, data, mask), mu[mask].mean(dim=0) - mu[~mask].mean(dim=0))
    first = np.flatnonzero(mask)[:2], np.flatnonzero(~mask)[:2]
    difference = mu[first[0]].mean(dim=0) - mu[first[1]].mean(dim=0)
    torch.testing.assert_close(attribute_direction(m, data, mask, n=2), difference)
    for empty in (mask & False, mask | True):
        with complains("30 images of shapes"):
            attribute_direction(m, data, empty)


@pytest.fixture(scope="module")
def eye():
    "A feature network with random weights, made in single precision as all others."
    torch.manual_seed(0)
    return FeatureNetwork(image_size=16, width=4, num_features=6)


def material(eye, n=24, batch=10, heldout=None, **options):
    eye.double()
    train, test = shapes(), shapes(30, start=100)
    return Material(train, test, eye, describe(eye, test if heldout is None else heldout), n, batch, **options)


def quick(m):
    "The model with two steps of refinement instead of twenty."
    m.refine = functools.partial(m.refine, steps=2)
    return m


def identical(m):
    "The model with a refiner that returns what it is given."
    m.refine = lambda x_hat, z=None, **options: x_hat.clamp(-1, 1)
    return m


NUMBERS = {"prior_gap": {f"{what} {where}" for what in ("x̂", "refined x̂")
                         for where in ("of real images", "from the prior", "from ex-PDE")},
           "robustness": {"levels", "noise on x̂", "noise on z"},
           "condition_agreement": {"shape", "hue", "both", "shuffled"}}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_study_answers_with_finite_numbers_the_same_ones_every_time(eye, name):
    m = quick(model(2, z_guidance=True))
    answer = STUDIES[name](m, material(eye, n=12, batch=7))
    assert set(answer) == NUMBERS[name] | {"n"} and answer["n"] == 12
    text = json.dumps(answer, allow_nan=False)
    torch.manual_seed(1)  # whatever the global generator does
    assert json.dumps(STUDIES[name](m, material(eye, n=12, batch=7))) == text
    assert json.dumps(STUDIES[name](m, material(eye, n=12, batch=7, seed=1))) != text


@pytest.mark.parametrize("steps", [None, 2])
def test_every_sample_of_a_study_takes_the_steps_of_its_material(eye, steps):
    m, asked = model(1), []
    m.refine = lambda x_hat, z=None, **options: asked.append(options.get("steps")) or x_hat.clamp(-1, 1)
    for name in NUMBERS:
        STUDIES[name](m, material(eye, n=12, batch=12, **({"steps": steps} if steps else {})))
        assert asked and set(asked) == {steps or 20}, name
        asked.clear()


@pytest.mark.parametrize("name", ["robustness", "condition_agreement"])
def test_a_study_draws_codes_from_the_prior_that_is_named(eye, name):
    m = quick(model(1))
    own, fitted = (STUDIES[name](m, material(eye, codes=codes)) for codes in (None, "ex-pde"))
    m.vae.prior = m.vae.fitted_prior("ex-pde", shapes())
    assert own != fitted == STUDIES[name](m, material(eye))


def test_robustness_starts_both_rows_at_the_same_distance(eye):
    answer = STUDIES["robustness"](quick(model(1, z_guidance=True)), material(eye, n=12))
    assert answer["levels"][0] == 0 and answer["noise on x̂"][0] == answer["noise on z"][0]
    assert len(answer["levels"]) == len(answer["noise on x̂"]) == len(answer["noise on z"]) > 2
    assert len(set(answer["noise on x̂"])) == len(answer["levels"]) == len(set(answer["noise on z"]))


def test_more_noise_takes_an_unrefined_image_further_away(eye):
    m = identical(model(1))
    with torch.no_grad():
        heldout = to_uint8(m.vae.decode(codes(200, seed=3)))
    answer = STUDIES["robustness"](m, material(eye, n=200, batch=100, heldout=heldout))
    for where in ("noise on x̂", "noise on z"):
        far = answer[where][::2]  # 0, 0.2, 0.8: noise of 0.1 changes the variance of z by less than chance does
        assert far == sorted(far) and far[-1] > 1.5 * far[0], answer


def test_the_prior_gap_is_the_distance_of_each_priors_images(eye):
    m = identical(model(1))
    m.vae.encoder.net[-1].bias.data[:4] += 4.0  # codes of real images lie far from N(0, I)
    with torch.no_grad():
        heldout = to_uint8(m.vae.decode(m.vae.codes(shapes(200, start=100))))
    answer = STUDIES["prior_gap"](m, material(eye, n=40, batch=15, heldout=heldout))
    for where in ("of real images", "from the prior", "from ex-PDE"):
        assert answer[f"refined x̂ {where}"] == pytest.approx(answer[f"x̂ {where}"], rel=1e-6)
    assert max(answer["x̂ of real images"], answer["x̂ from ex-PDE"]) < 0.5 * answer["x̂ from the prior"], answer


def test_the_path_length_is_that_of_the_vae_over_enough_pairs(eye):
    m = model(1)
    answer = STUDIES["path_length"](m, material(eye, n=12))
    assert answer == STUDIES["path_length"](m.vae, material(eye, n=12)) and answer["n"] == 60 and answer["x̂"] > 0


class Barcode:
    "Reads a shape and a hue from the last digits of the pixels' sum: nearly every image has others."

    factors = True

    def read(self, images):
        number = images.flatten(1).long().sum(dim=1)
        return {"class": number % 3, "hue": number % 97 / 97}


def test_agreement_is_whole_for_an_unchanged_image_and_chance_for_anothers(eye):
    m, look = identical(model(1)), dataclasses.replace(material(eye, n=60, batch=25), features=Barcode())
    answer = STUDIES["condition_agreement"](m, look)
    assert answer["n"] == 60 and answer["shape"] == answer["hue"] == answer["both"] == 1
    shuffled = answer["shuffled"]
    assert abs(shuffled["shape"] - 1 / 3) < 0.25 and abs(shuffled["hue"] - 1 / 6) < 0.2 and shuffled["both"] < 0.3
    m.refine = lambda x_hat, z=None, **options: x_hat.roll(1, 0)  # everybody has the neighbour's
    answer = STUDIES["condition_agreement"](m, dataclasses.replace(look, batch=60))
    assert answer["shuffled"] == {"shape": 1, "hue": 1, "both": 1} and answer["both"] < 0.3


def test_the_readout_sees_factors_that_are_in_the_code_and_no_others(eye):
    m, train, test = model(1), shapes(300), shapes(150, start=1000)
    look = Material(train, test, eye, None)

    def code(data):
        angles = 2 * np.pi * data.labels[:, [1]]
        one_hot = np.eye(3)[data.labels[:, 0].astype(int)]
        return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles), one_hot], axis=1))
    known = iter([code(train), code(test)])
    m.vae.encode = lambda x: (next(known), None)
    answer = STUDIES["readout"](m, look)
    assert answer["hue"] > 0.99 and answer["shape"] > 0.99
    assert all(answer[name] < 0.2 for name in ("ground", "size", "x", "y")), answer
    assert set(answer) == set(STUDIES["readout"](model(1).vae, look))  # a VAE has a readout too


# --- likelihood -----------------------------------------------------------------------------------------------------

def pixels(n=4):
    return torch.randint(256, (n, 3, 16, 16), generator=generator(4)) / 127.5 - 1


def bound(m, x=None, **options):
    x = pixels() if x is None else x
    return m.likelihood_bound(x, image_draws(0, 0, len(x)), timesteps=3, **options)


@CONVERTED
def test_converted_weights_give_the_same_bound_in_the_other_form(form, z_guidance, unet, diffusion):
    one = model(form, z_guidance, unet=unet, diffusion=diffusion)
    found, other = bound(one), bound(convert_form(one))
    assert set(found) == {"kl", "noise", "diffusion", "decoder"}
    for name, value in found.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=0)
    unconverted = bound(with_weights_of(one, form=3 - form))
    assert not torch.allclose(unconverted["diffusion"], found["diffusion"], rtol=1e-3)


@ALL_VARIANTS
def test_the_bound_is_the_kl_of_the_code_and_the_refiners_bound_given_what_is_decoded_from_it(form, z_guidance, concat):
    m, x = model(form, z_guidance, concat), pixels()
    means = torch.randn(2, 4, generator=generator())
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), means, torch.eye(4).repeat(2, 1, 1))
    found, draws = bound(m, x, priors=(None, mixture)), image_draws(0, 0, 4)
    with torch.no_grad():
        x_hat, z = m.draw_coarse(x, draws)
        y_of = lambda x_t: x_t + x_hat if form == 2 else x_t
        network = lambda y, t: m.unet(y_of(y), t, cond=x_hat if concat else None, z=z if z_guidance else None)
        refiner = m.diffusion.likelihood_bound(network, x, draws, 3)
    for name, value in refiner.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0)
    own = m.vae.likelihood_bound(x, image_draws(0, 0, 4), (None, mixture))["kl"]
    torch.testing.assert_close(found["kl"], own, rtol=0, atol=0)


def test_with_a_code_that_says_nothing_the_bound_is_that_of_plain_diffusion():
    m, x = model(1), pixels()
    for layer in (m.vae.encoder.net[-1], m.vae.decoder.net[-2]):  # μ = 0, σ = 1, x̂ = 0
        layer.weight.data.zero_(), layer.bias.data.zero_()
    plain = DDPM(UNET, m.diffusion.config).eval()
    state = dict(m.unet.state_dict())
    state["stem.weight"] = state["stem.weight"][:, :3]
    plain.unet.load_state_dict(state)
    draws = image_draws(0, 0, 4)
    draws.randn(4, 4)  # the code's
    want, found = plain.likelihood_bound(x, draws, timesteps=3), bound(m, x)
    assert found.pop("kl").eq(0).all() and set(found) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0)


def measured(m, eye, **options):
    return STUDIES["likelihood"](m, material(eye, **{"n": 12, "batch": 7, "steps": 3} | options))


MEASURED = {"VAE": lambda: model(1).vae, "DDPM": lambda: randomised(DDPM(UNET)),
            "DiffuseVAE": lambda: model(2, z_guidance=True)}
STEPS = {"noise", "diffusion", "decoder"}
PARTS = {"VAE": {"kl", "reconstruction"}, "DDPM": STEPS, "DiffuseVAE": {"kl", *STEPS}}


@pytest.mark.parametrize("kind", MEASURED)
def test_the_likelihood_is_the_mean_bound_in_bits_the_same_in_all_batches(eye, kind):
    m, look = MEASURED[kind](), material(eye)
    answer = measured(m, eye)
    priors = ["own", "ex-pde", "realnvp"][:{"DDPM": 1, "DiffuseVAE": 2, "VAE": 3}[kind]]
    assert list(answer) == ["n", *["timesteps"] * (kind != "VAE"), *priors] and answer["n"] == 12
    fitted = [None, *(getattr(m, "vae", m).fitted_prior(name, look.train) for name in priors[1:])]
    with torch.no_grad():
        parts = m.likelihood_bound(look.test.float(12), image_draws(0, 0, 12), tuple(fitted), 3)
    bits = {name: (value / (768 * math.log(2))).expand(len(priors), 12) for name, value in parts.items()}
    for i, name in enumerate(priors):
        found, each = answer[name], sum(value[i] for value in bits.values())
        assert set(found) == {"bits_per_dim", "standard_error"} | PARTS[kind]
        assert found["bits_per_dim"] == pytest.approx(each.mean().item(), rel=1e-6)
        assert found["bits_per_dim"] == pytest.approx(sum(found[part] for part in PARTS[kind]), rel=1e-9)
        assert found["standard_error"] == pytest.approx(np.std(each.numpy(), ddof=1) / 12**0.5, rel=1e-5)
    text = json.dumps(answer, allow_nan=False)
    torch.manual_seed(1)  # whatever the global generator does
    assert json.dumps(measured(m, eye)) == text
    for name in priors:
        assert measured(m, eye, batch=5)[name] == pytest.approx(answer[name], rel=1e-6)
        assert measured(m, eye, seed=1)[name] != answer[name]
    assert measured(m, eye, n=500)["n"] == 30  # all that are held out


def test_likelihood_is_measured_in_full_precision(eye):
    m = randomised(DDPM(UNET))
    with torch.autocast("cpu", torch.bfloat16):
        half = measured(m, eye)
    assert half == measured(m, eye)


def test_a_model_without_a_bound_is_refused(eye):
    with complains("FeatureNetwork", "leave this study out"):
        measured(eye, eye)


# --- entries --------------------------------------------------------------------------------------------------------

def test_entries_of_different_names_have_different_configs_in_every_data_set():
    names = {e.dataset for e in entries_of(stage="diffusevae")}
    assert names == {"shapes", "scenes", "cifar10", "celeba64", "celeba256"}
    for dataset in ("shapes", "scenes", "cifar10", "celeba64", "celeba256"):
        entries = [e for e in entries_of(dataset, "diffusevae") if e.seed == 0]
        assert len({config_hash(e.config) for e in entries}) == len({e.experiment for e in entries}) == len(entries)
    with complains("'imagenet'", "choose from shapes, scenes, cifar10"):
        entries_of("imagenet", "diffusevae")


def test_every_entry_names_studies_feature_networks_and_dependencies_that_exist():
    entries = entries_of(stage="diffusevae")
    known = {(e.dataset, e.experiment, e.seed) for e in entries}
    assert len(known) == len(entries)
    for e in entries:
        assert set(e.studies) <= set(STUDIES)
        assert e.features is None or (e.dataset, e.features, 0) in known
        assert all((e.dataset, name, e.seed) in known for name in e.depends_on.values())
        assert len(e.evaluations) == len({json.dumps(v, sort_keys=True) for v in e.evaluations})


def test_the_protocol_of_the_design_is_asked_for():
    """20 steps of DPM-Solver++ with all images in every record; samplers and steps with fewer at seed 0.

    Ancestral once for each data set but CelebA-256, where its 1,000 steps would cost more than the training.
    """
    full = {"shapes": 2_000, "cifar10": 10_000, "celeba64": 5_000, "celeba256": 2_000}
    for dataset, n in full.items():
        entries = [e for e in entries_of(dataset, "diffusevae") if e.evaluations
                   and not e.experiment.endswith(campaign.SIZES) and not e.experiment.startswith("trial-")]
        photographs = dataset != "shapes"
        for e in entries:
            one_shot = e.model["model"] == "VAE"
            main = {"sampler": None if one_shot else "dpmpp", "steps": 1 if one_shot else 20, "n": n}
            fitted = {"prior": "ex-pde"} if photographs and e.experiment != "ddpm" else {}  # the code holds much
            assert e.evaluations[0] == main | fitted and main in e.evaluations
            curve = {(v["sampler"], v["steps"]) for v in e.evaluations
                     if v["sampler"] in ("dpmpp", "ddim") and v["n"] < n}
            if e.seed == 0 and e.experiment in ("ddpm", "diffusevae-form1-z" if photographs else "diffusevae-form2"):
                assert curve >= {(s, steps) for s in ("dpmpp", "ddim") for steps in (10, 20, 50)}
        ancestral = [e for e in entries
                     if any(v["sampler"] == "ancestral" and v["steps"] == 1000 for v in e.evaluations)]
        assert len(ancestral) == (dataset != "celeba256")
        seeds = {e.experiment: {f.seed for f in entries if f.experiment == e.experiment} for e in entries}
        assert dataset == "celeba256" or seeds["diffusevae-form1"] == seeds["ddpm"] == seeds["vae"] == {0, 1, 2}


def test_the_full_size_is_the_papers_recipe_and_a_pair_with_its_control():
    for dataset in ("cifar10", "celeba64"):
        full = {e.experiment: e for e in entries_of(dataset, "diffusevae") if e.experiment.endswith("-full")}
        assert full.keys() == {"vae-full", "ddpm-full", "diffusevae-form1-z-full"}
        ddpm, hybrid = full["ddpm-full"], full["diffusevae-form1-z-full"]
        assert ddpm.train == hybrid.train and ddpm.model["unet"] == hybrid.model["unet"]
        assert hybrid.depends_on == {"vae": "vae-full"}
        for e in (ddpm, hybrid):
            assert e.model["diffusion"] == {"schedule": "linear", "timesteps": 1000, "prediction": "eps",
                                            "weighting": "simple"}
            assert {(v["sampler"], v["steps"]) for v in e.evaluations} == {("dpmpp", 20), ("ancestral", 1000)}
            decay = TrainConfig(**e.train).ema_decay_at(10**9)
            assert decay == pytest.approx(0.9999, abs=1e-6)
            assert e.train["warmup_kimg"] == 5_000 * e.train["batch_size"] / 1000


def test_studies_take_the_steps_of_the_main_evaluation():
    for e in entries_of(stage="diffusevae"):
        if e.studies and e.evaluations[0]["sampler"]:
            assert e.steps_study == e.evaluations[0]["steps"], e.experiment
