"""PCA of the latent code: the components, the projection, training with every k, sampling with fewer, files."""
import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.core import Draws, build_model, image_draws, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.entries import find_entry
from hybridvae.experiments import PRESETS, entries_of
from hybridvae.generators import projected
from hybridvae.joint import JointDiffuseVAE
from hybridvae.pca_guidance import PCADiffuseVAE, ProjectingPCA, mean_codes, with_components
from hybridvae.training import TrainConfig, train
from hybridvae.vae import VAE

VAE_CONFIG = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
COSINE = {"schedule": "cosine", "prediction": "v", "weighting": "min_snr"}
EVERY_K = pytest.mark.parametrize("k", [1, 2, 3, 4])


def shapes(n=60):
    factors = shapes_factors(np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, 16), factors)


def images(n=8, seed=1):
    return torch.rand(n, 3, 16, 16, generator=generator(seed)) * 2 - 1


def guided(k=2, **options):
    "A model with components that were measured."
    model = randomised(PCADiffuseVAE(VAE_CONFIG, UNET, COSINE, z_guidance=True, components=k, **options))
    model.prepare(shapes())
    return model


def plain(**options):
    return randomised(DiffuseVAE(VAE_CONFIG, UNET, COSINE, z_guidance=True, **options))


def measured(n=400, dim=6, seed=0):
    "Codes of very different spread along oblique axes, and their PCA."
    mixing = torch.randn(dim, dim, generator=generator(seed)) * torch.logspace(1, -2, dim)
    codes = torch.randn(n, dim, generator=generator(seed + 1)) @ mixing.T + torch.arange(dim)
    pca = ProjectingPCA(dim)
    pca.measure(codes)
    return codes, pca


# --- components -----------------------------------------------------------------------------------------------------

def test_mean_components_and_variances_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    codes, pca = measured()
    oracle = PCA().fit(codes.double().numpy())
    np.testing.assert_allclose(pca.mean, oracle.mean_, atol=1e-5)
    np.testing.assert_allclose(pca.variance, oracle.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose((pca.components.numpy() * oracle.components_).sum(axis=1).__abs__(), 1, atol=1e-5)
    np.testing.assert_allclose(pca.share(), oracle.explained_variance_ratio_.cumsum(), rtol=1e-5)


def test_components_are_orthonormal_and_their_variances_sum_to_that_of_the_codes():
    codes, pca = measured()
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), atol=1e-6, rtol=0)
    assert (pca.variance.diff() <= 0).all() and (pca.variance >= 0).all()
    torch.testing.assert_close(pca.variance.sum(), codes.var(dim=0).sum(), rtol=1e-5, atol=0)
    assert pca.share()[-1] == pytest.approx(1) and (pca.share().diff() >= 0).all()


def test_fewer_codes_than_numbers_still_give_a_whole_basis():
    pca = ProjectingPCA(6)
    pca.measure(torch.randn(3, 6, generator=generator()))
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), atol=1e-6, rtol=0)
    assert (pca.variance[2:] < 1e-6).all() and (pca.variance >= 0).all()  # three points lie in a plane
    one = ProjectingPCA(1)
    one.measure(torch.tensor([[1.0], [3.0]]))
    assert one.components.abs().item() == 1 and one.variance.item() == pytest.approx(2)


def test_the_same_codes_in_another_order_have_the_same_components():
    codes, pca = measured()
    other = ProjectingPCA(6)
    other.measure(codes.flip(0))
    torch.testing.assert_close(other.components, pca.components, atol=1e-5, rtol=0)


def test_one_code_has_no_components():
    with complains("1 codes", "at least two"):
        ProjectingPCA(4).measure(torch.zeros(1, 4))


# --- the projection -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", range(1, 7))
def test_a_projection_is_the_nearest_code_of_k_components(k):
    codes, pca = measured()
    flat = pca.project(codes, k)
    torch.testing.assert_close(pca.project(flat, k), flat, atol=1e-4, rtol=1e-5)  # again: nothing happens
    inside = (codes - pca.mean) @ pca.components.T
    torch.testing.assert_close((flat - pca.mean) @ pca.components.T,
                               torch.cat([inside[:, :k], torch.zeros(len(codes), 6 - k)], dim=1), atol=1e-4, rtol=1e-5)
    lost = (codes - flat).square().sum() / (len(codes) - 1)
    torch.testing.assert_close(lost, pca.variance[k:].sum(), atol=1e-5, rtol=1e-3)  # Pythagoras
    torch.testing.assert_close(flat.mean(dim=0), codes.mean(dim=0), atol=1e-4, rtol=1e-5)


def test_all_components_are_the_identity_in_half_precision_too():
    codes, pca = measured()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pca.project(codes, 6), codes, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_no_component_and_too_many_are_refused(k):
    words = f"components is {k}: choose from 1 to 4, the length of the code"
    for call in (lambda: PCADiffuseVAE(VAE_CONFIG, UNET, z_guidance=True, components=k),
                 lambda: ProjectingPCA(4).project(torch.zeros(1, 4), k), lambda: with_components(plain(), shapes(), k),
                 lambda: guided().sample(1, steps=1, components=k)):
        with pytest.raises(ValueError, match=words):
            call()


def test_codes_along_a_component_move_by_its_deviation():
    _, pca = measured()
    path = pca.along(1, torch.tensor([-2.0, 0.0, 1.0]))
    torch.testing.assert_close(path[1], pca.mean)
    scores = (path - pca.mean) @ pca.components.T
    torch.testing.assert_close(scores[:, 1], torch.tensor([-2.0, 0.0, 1.0]) * pca.variance[1].sqrt())
    assert scores[:, [0, 2, 3, 4, 5]].abs().max() < 1e-5


# --- the model ------------------------------------------------------------------------------------------------------

def test_components_are_those_of_mean_codes_of_the_training_images():
    model, data = guided(), shapes()
    codes = model.vae.encode(data.float())[0].detach()
    torch.testing.assert_close(mean_codes(model.vae, data), codes, atol=1e-5, rtol=1e-4)
    assert len(mean_codes(model.vae, data, n=7)) == 7
    torch.testing.assert_close(model.pca.mean, codes.mean(dim=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.pca.variance.sum(), codes.var(dim=0).sum(), rtol=1e-4, atol=0)
    assert model.measures(data, data)["explained_variance"] == pytest.approx(model.pca.share().tolist())


@EVERY_K
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_k_trains_without_nan(k, precision):
    torch.manual_seed(0)
    model = PCADiffuseVAE(VAE_CONFIG, UNET, COSINE, z_guidance=True, components=k).train()
    model.prepare(shapes())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses, x = [], shapes(16).float()
    for step in range(12):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model.training_loss(x, draws=Draws(0, step % 2))["loss"]
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and sum(losses[-2:]) < sum(losses[:2])


def test_training_measures_the_components_first_and_a_file_holds_them(tmp_path):
    torch.manual_seed(0)
    model, data = PCADiffuseVAE(VAE_CONFIG, UNET, COSINE, z_guidance=True, components=3, snr_from=0.5), shapes()
    result = train(model, data, TrainConfig(kimg=0.032, batch_size=16), tmp_path / "run", progress=False, cpu=True)
    assert result.finished and model.pca.share()[0] < 1
    torch.testing.assert_close(model.pca.mean, mean_codes(model.vae, data).mean(dim=0), atol=1e-5, rtol=1e-4)
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    assert (again.components, again.snr_from) == (3, 0.5) and build_model(again.config).config == again.config
    draw = lambda one: one.sample(2, steps=2, generator=image_draws(0, 0, 2))
    torch.testing.assert_close(draw(again), draw(model), atol=1e-5, rtol=0)
    assert torch.equal(again.pca.components, model.pca.components)
    small = load_model(save_model(model, tmp_path / "half.safetensors", torch.float16))
    torch.testing.assert_close(small.pca.components, model.pca.components, atol=1e-3, rtol=0)


def test_only_the_network_is_trained():
    model = guided().train()
    model.training_loss(images())["loss"].backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"unet"} and not model.vae.training


def test_the_network_gets_the_projected_code_and_the_full_coarse_image():
    model, seen = guided(2), {}
    handle = model.unet.register_forward_pre_hook(lambda m, args, given: seen.update(given), with_kwargs=True)
    model.training_loss(images(), draws=Draws(3, 0))
    handle.remove()
    x_hat, z = model.draw_coarse(images(), Draws(3, 0))
    torch.testing.assert_close(seen["z"], model.pca.project(z, 2))
    torch.testing.assert_close(seen["cond"], x_hat)
    assert (seen["z"] - z).abs().max() > 1e-2


# --- sampling -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [1, 2])
def test_with_all_components_a_sample_is_the_plain_one(form, double_precision):
    model = plain(form=form).double()
    other = with_components(model, shapes(), 4)
    other.pca.double().measure(mean_codes(other.vae, shapes()))
    own, same, fewer = (one.sample(3, steps=4, generator=generator()) for one in (model, other, other.keeping(1)))
    torch.testing.assert_close(own, same, atol=1e-6, rtol=0)
    assert (own - fewer).abs().max() > 1e-3


def test_a_plain_model_is_projected_without_training_and_shares_its_weights(tmp_path):
    model = plain()
    other = with_components(model, shapes(), 2)
    assert other.unet is model.unet and other.vae is model.vae and not other.training
    torch.testing.assert_close(other.pca.mean, guided().pca.mean)
    again = load_model(save_model(other, tmp_path / "model.safetensors"))
    draw = lambda one: one.sample(2, steps=2, generator=generator())
    assert torch.equal(draw(again), draw(other)) and not torch.equal(draw(other), draw(model))


def test_a_number_given_to_one_call_leaves_the_model_as_it_is():
    model = guided(2)
    draw = lambda **options: model.sample(2, steps=3, generator=generator(), **options)
    before = draw()
    assert not torch.equal(draw(components=1), before) and not torch.equal(draw(snr_from=1.0), before)
    assert torch.equal(draw(components=1), model.keeping(1).sample(2, steps=3, generator=generator()))
    assert torch.equal(draw(), before) and (model.components, model.snr_from) == (2, 0.0)
    assert model.config["components"] == 2 and model.keeping(1).config["components"] == 1
    assert with_components(model, None, 3).components == 3


@pytest.mark.parametrize("snr", [0.25, 1.0, 9.0])
def test_only_steps_of_high_snr_get_the_projected_code(snr):
    model, seen = guided(2, snr_from=snr), {}
    z, alpha_bar = torch.randn(1, 4, generator=generator()), model.diffusion.alphas_cumprod
    model.unet.register_forward_pre_hook(lambda m, args, given: seen.update({args[1][0].item(): given["z"]}),
                                         with_kwargs=True)
    model.refine(model.vae.decode(z).detach(), z, steps=20, generator=generator())
    high = {t: alpha_bar[t] / (1 - alpha_bar[t]) >= snr for t in seen}
    assert 0 < sum(high.values()) < 20
    for t, code in seen.items():
        torch.testing.assert_close(code, model.pca.project(z, 2) if high[t] else z)
    losses = [guided(2, snr_from=s).training_loss(images(), draws=Draws(0, 0))["loss"] for s in (0.0, snr, 1e9)]
    assert len({loss.item() for loss in losses}) == 3


def test_a_negative_snr_is_refused():
    with pytest.raises(ValueError, match="snr_from is -1: choose 0"):
        guided(2, snr_from=-1.0)


def test_a_model_without_a_guiding_code_is_refused():
    with pytest.raises(ValueError, match="z_guidance is False: set it to True"):
        PCADiffuseVAE(VAE_CONFIG, UNET, components=2)
    with complains("DiffuseVAE without z guidance", "z_guidance=True"):
        with_components(DiffuseVAE(VAE_CONFIG, UNET), shapes(), 2)
    with complains("this is a JointDiffuseVAE"):
        with_components(JointDiffuseVAE(VAE_CONFIG, UNET, z_guidance=True), shapes(), 2)
    with complains("this is a VAE"):
        with_components(VAE(**VAE_CONFIG), shapes(), 2)


def test_the_command_line_needs_images_for_components_that_weights_do_not_hold():
    with complains("--components needs --dataset", "DiffuseVAE"):
        projected(plain(), 2)
    assert projected(guided(), 3).components == 3
    with complains("components is 9: choose from 1 to 4"):
        projected(guided(), 9)


# --- the table ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", ["scenes", "celeba64"])
def test_every_row_has_a_number_of_components_that_its_code_has(dataset):
    entries = entries_of(dataset, "pca_guidance")
    assert {f"pca-k{k}" for k in ((1, 2, 4, 8, 12) if dataset == "scenes" else (32, 64, 128))} <= {
        e.experiment for e in entries}
    for e in entries:
        most = e.model["vae"]["z_dim"]
        assert all(1 <= o.get("components", 1) <= most for o in (e.model, *e.evaluations)), e.experiment
        if not e.experiment.startswith("pca-sampling"):
            assert e.model["components"] == int(e.experiment.split("-")[1][1:])
    whole = max(e.model["components"] for e in entries)
    assert whole == PRESETS[dataset]["vae"]["z_dim"]  # the control of equal images


def test_variants_start_from_the_guided_model_and_differ_in_the_projection_alone():
    entries = entries_of("scenes", "pca_guidance")
    control = find_entry(entries, "pca-k12")
    for e in entries:
        assert e.depends_on == {"vae": "diffusevae-form1-z", "unet": "diffusevae-form1-z"} and e.train == control.train
        assert {k for k in e.model | control.model if e.model.get(k) != control.model.get(k)} <= {"components",
                                                                                                  "snr_from"}
