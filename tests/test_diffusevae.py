"""DiffuseVAE: the two forms and their equivalence, what the condition and the code do, and the frozen VAE."""
import pytest
import torch
from conftest import generator, randomised
from hybridvae.core import Draws, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE, convert_form
from hybridvae.training import Average, TrainConfig, train
from hybridvae.vae import VAE
from safetensors.torch import load_file

VAE_CONFIG = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
ALL_VARIANTS = pytest.mark.parametrize("form, z_guidance, concat", [
    (form, z_guidance, concat) for form in (1, 2) for z_guidance in (False, True) for concat in (True, False)])
SAMPLERS = pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp"])


@pytest.fixture(autouse=True)
def double_precision(monkeypatch):
    "All numbers of this file in float64, those that the package casts to float32 too: equalities can then be tight."
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(form=1, z_guidance=False, concat=True, unet=None, diffusion=None):
    "A DiffuseVAE with random weights."
    return randomised(DiffuseVAE(VAE_CONFIG, {**UNET, **(unet or {})}, diffusion, form, z_guidance, concat), scale=0.3)


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
    honest, condition = loss(m), m.condition

    def shuffled(x, draws):
        return tuple(v.roll(1, 0) for v in condition(x, draws))
    m.condition = shuffled
    assert abs(loss(m) / honest - 1) > 1e-3


def test_the_condition_is_drawn_and_not_the_mean():
    m, x = model(1), images()
    x_hat, z = m.condition(x, Draws(0, 0))
    again, other = (m.condition(x, Draws(0, step))[0] for step in (0, 1))
    assert torch.equal(x_hat, m.vae.decode(z)) and torch.equal(x_hat, again) and not torch.allclose(x_hat, other)
    mu, logvar = m.vae.encode(x)
    many = torch.stack([m.condition(x, Draws(0, step))[1] for step in range(400)])
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


def test_the_grid_beside_a_record_shows_coarse_images_above_their_refinements():
    m = model(1)
    x_hat, x = m.sample_pairs(32, sampler="ddim", steps=2, generator=generator(7))
    rows = m.showcase(generator(7), "ddim", 2).reshape(8, 8, 3, 16, 16)
    assert torch.equal(rows[0::2].flatten(0, 1), x_hat) and torch.equal(rows[1::2].flatten(0, 1), x)


@pytest.mark.parametrize("form", [1, 2])
def test_sampling_starts_at_the_noise_the_form_says(form):
    m, x_hat, seen = model(form), images(seed=5), []
    m.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    m.refine(x_hat, steps=2, generator=generator(3))
    noise = torch.randn(x_hat.shape, generator=generator(3))
    torch.testing.assert_close(seen[0], noise + (x_hat if form == 2 else 0))  # N(x̂, I) or N(0, I)


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
