"""Images are drawn by their number: the same in any batch, in any part of a set, in samples, evaluations and grids."""
import json

import numpy as np
import pytest
import torch
from conftest import generator, randomised
from hybridvae import cli, data, runs
from hybridvae.adaptive import AdaptiveDiffuseVAE
from hybridvae.core import Draws, choose, image_draws, image_grid, load_model, rand, randn, save_model, to_uint8
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.features import load_features
from hybridvae.latent import LatentDiffuseVAE, LatentDiffusion
from hybridvae.metrics import describe
from hybridvae.priors import FITTED
from hybridvae.entries import Entry
from hybridvae.runs import evaluate, run_entry
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from PIL import Image
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("float32")
VAE_CONFIG = {"image_size": 16, "z_dim": 4, "width": 8, "multipliers": [1, 2]}
UNET = {"image_size": 16, "width": 16, "multipliers": [1, 2], "attention": [4], "patch": 2}
DENOISER = {"width": 8, "blocks": 1}


def shapes(n=60, size=16):
    factors = shapes_factors(np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, size), factors)


MODELS = {
    "vae": lambda: VAE(**VAE_CONFIG),
    "vae with a flow": lambda: VAE(**VAE_CONFIG, prior={"prior": "FlowPrior", "kind": "realnvp"}),
    "vae with a mixture": lambda: VAE(**VAE_CONFIG, prior={"prior": "MoGPrior", "components": 5}),
    "ddpm": lambda: DDPM(UNET),
    "form 1": lambda: DiffuseVAE(VAE_CONFIG, UNET, cond_dropout=0.1),
    "form 2 + z": lambda: DiffuseVAE(VAE_CONFIG, UNET, form=2, z_guidance=True),
    "adaptive": lambda: AdaptiveDiffuseVAE(VAE_CONFIG, UNET),
    "latent": lambda: LatentDiffusion(VAE_CONFIG, DENOISER),
    "hybrid of both": lambda: LatentDiffuseVAE(VAE_CONFIG, UNET, denoiser=DENOISER),
}
HALF = {"uncertainty": "prior", "start": [0.3, 1.0]}
ANCESTRAL = {"sampler": "ancestral"}
OPTIONS = [
    ("vae", {}), *[("vae", {"prior": name}) for name in FITTED], ("vae with a flow", {}), ("vae with a mixture", {}),
    ("ddpm", {}), ("ddpm", ANCESTRAL), ("ddpm", {"sampler": "ddim", "eta": 1.0}), ("form 1", {}),
    ("form 1", {"guidance_weight": 2.0}), ("form 2 + z", ANCESTRAL), ("adaptive", {}), ("adaptive", ANCESTRAL | HALF),
    ("adaptive", {"strength": [0.0, 1.0], **HALF, "shuffled": True}), ("latent", {}), ("latent", ANCESTRAL),
    ("hybrid of both", {"refine_steps": 2})]


def words(value):
    "The id of a parameter: a name, or the values of options."
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain"


@pytest.mark.parametrize("name, chosen", OPTIONS, ids=words)
def test_an_image_is_the_same_whatever_is_drawn_with_it(name, chosen):
    torch.manual_seed(0)
    model = randomised(MODELS[name](), 0.1)
    options = model.sampling_options({"sampler": "dpmpp", "steps": 3, **chosen}, shapes())
    draw = lambda start, stop: model.sample(stop - start, generator=image_draws(7, start, stop), **options)
    whole = draw(0, 7)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # they do differ
    for start, stop in ((0, 4), (4, 7), (3, 4)):
        torch.testing.assert_close(draw(start, stop), whole[start:stop], atol=1e-5, rtol=0)


def test_numbers_by_image_follow_their_distributions_and_differ_from_image_to_image():
    numbers, uniform = randn((20_000, 2), image_draws(0, 0, 20_000)), rand((20_000,), image_draws(0, 0, 20_000))
    assert numbers.mean().abs() < 0.02 and (numbers.std() - 1).abs() < 0.02
    assert torch.corrcoef(numbers.T)[0, 1].abs() < 0.03
    assert (uniform.mean() - 0.5).abs() < 0.01 and 0 <= uniform.min() and uniform.max() < 1
    assert len(uniform.unique()) > 19_000
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0])
    for source in (image_draws(0, 0, 20_000), generator()):
        share = choose(weights, 20_000, source).bincount(minlength=4) / 20_000
        torch.testing.assert_close(share, weights / 8, atol=0.015, rtol=0)
        assert share[1] == 0
    assert not torch.equal(randn((3, 4), image_draws(0, 0, 3)), randn((3, 4), image_draws(1, 0, 3)))


def test_a_part_of_draws_shares_their_generators():
    whole, part = Draws(0, "image", range(5)), Draws(0, "image", range(5))
    assert torch.equal(part.part([3, 1]).randn(2, 4), whole.randn(5, 4)[[3, 1]])
    assert torch.equal(part.part([3]).randn(1, 4), whole.part([3]).randn(1, 4))  # which go on where they were


def test_an_evaluation_looks_at_the_same_images_in_any_batch():
    torch.manual_seed(0)
    unet = UNET | {"image_size": 32, "attention": [8]}
    model, network = randomised(DiffuseVAE(VAE_CONFIG | {"image_size": 32}, unet), 0.1), load_features("shapes")
    reference = [{"held-out": describe(network, shapes(40, 32).tensor())}]
    asked = {"sampler": "dpmpp", "steps": 2, "n": 23}
    found = [evaluate(model, [network], reference, asked, batch=batch, progress=False) for batch in (23, 10, 4)]
    assert all(f["drawn"] == "by image" for f in found)
    for name, metric in found[0]["metrics"].items():
        for other in found[1:]:
            assert other["metrics"][name]["value"] == pytest.approx(metric["value"], rel=2e-3, abs=2e-3), name


def test_the_command_line_draws_the_same_images_for_any_n_batch_and_part(tmp_path):
    torch.manual_seed(0)
    file = save_model(randomised(DiffuseVAE(VAE_CONFIG, UNET), 0.1), tmp_path / "m.safetensors")

    def sample(name, *words):
        options = ["--cpu", "--steps", "3", "--seed", "5", "--weights", str(file), "--out", str(tmp_path / name)]
        answer = CliRunner().invoke(cli.app, [*map(str, words), *options])
        assert answer.exit_code == 0, answer.output + repr(answer.exception)
        return np.load(tmp_path / name)["arr_0"].astype(int)
    eight = sample("a.npz", "sample", "--n", 8)
    assert np.abs(eight[0] - eight[1]).max() > 1
    for name, words, part in (("b.npz", ("--n", 4), slice(0, 4)), ("c.npz", ("--n", 8, "--batch", 3), slice(0, 8)),
                              ("d.npz", ("--n", 3, "--first", 5), slice(5, 8))):
        assert np.abs(sample(name, "sample", *words) - eight[part]).max() <= 1, words


def test_the_grid_of_a_record_shows_the_first_images_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
    runs._forget()
    entry = Entry("vae", "shapes", {"model": "VAE", **VAE_CONFIG, "image_size": 32}, {"kimg": 0.016, "batch_size": 8},
                  features="features", seed=3, evaluations=({"sampler": None, "steps": 1, "n": 20},), batch=20)
    network = {"model": "FeatureNetwork", "name": "shapes", "classes": 3, "factors": True}
    features = Entry("features", "shapes", network, {"kimg": 0.016})
    run_entry(entry, [entry, features], tmp_path, cpu=True, progress=False)
    model = load_model(entry.folder(tmp_path) / "model.safetensors")
    drawn = to_uint8(model.sample(100, generator=image_draws(3, 0, 100)))
    picture = np.asarray(Image.open(tmp_path / "shapes" / "vae" / "seed3.png")).astype(int)
    assert np.abs(picture - image_grid(drawn, 10).astype(int)).max() <= 1
    assert json.loads((tmp_path / "shapes" / "vae" / "seed3.json").read_text())["evaluations"][0]["drawn"] == "by image"
