"""The command line: what each command writes, with tiny models, and one sentence for every mistake."""
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path
from unittest.mock import Mock

import hybridvae
import nbformat
import numpy as np
import pytest
import torch
import typer
from conftest import disk_full, files_below, generator, inception_stand_in, randomised
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from hybridvae import bench as benches
from hybridvae import campaign as campaigns
from hybridvae import cli, core, custom, data, experiments, generators, metrics, report, runs, selection
from hybridvae.cli import app, main
from hybridvae.core import HybridVAEError, image_draws, load_model, save_model, to_uint8, weights_hash
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.features import FeatureNetwork, load_features, weights_folder
from hybridvae.images import check_target
from hybridvae.latent import LatentDiffuseVAE, LatentDiffusion
from hybridvae.metrics import extract, frechet_distance, slerp
from hybridvae.profiling import Profile
from hybridvae.priors import GaussianMixture, fit_mixture
from hybridvae.report import read_bibliography, render_report, resolve_references
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from hybridvae.records import record_roots, results_folder

TINY_VAE = {"image_size": 32, "z_dim": 4, "width": 8, "multipliers": [1, 2], "patch": 4, "sigma": 0.1}
TINY_UNET = {"image_size": 32, "width": 16, "multipliers": [1], "attention": [], "patch": 4}
TINY_TRAIN = {"kimg": 0.128, "batch_size": 32, "lr": 1e-3}
COMMANDS = typer.main.get_command(app).commands
pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def tiny(monkeypatch):
    "All presets at a size that trains in a second, on few images, with one seed."
    presets = copy.deepcopy(experiments.PRESETS)
    for preset in presets.values():
        preset.update(vae=TINY_VAE, unet=TINY_UNET, n=60, n_curve=None, n_study=20, batch=60,
                      train=TINY_TRAIN, train_vae=TINY_TRAIN, train_features=TINY_TRAIN)
    for module in (experiments, custom):
        monkeypatch.setattr(module, "PRESETS", presets)
    alone = lambda row: dataclasses.replace(row, on=row.on and dict.fromkeys(row.on, 1))  # seed 0
    tables = {name: tuple(map(alone, table)) for name, table in experiments.TABLES.items()}
    monkeypatch.setattr(experiments, "TABLES", tables)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 200, "test": 100})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache with a CIFAR-10 of 60 + 60 random images."
    root = tmp_path / "cache"
    (root / "cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(root / "cifar10" / f"{split}_images.npy", rng.integers(0, 256, (60, 32, 32, 3), np.uint8))
        np.save(root / "cifar10" / f"{split}_labels.npy", rng.integers(0, 10, 60).astype(np.uint8))
    monkeypatch.setenv("HYBRIDVAE_DATA", str(root))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Tiny untrained models as weights files: name -> path."
    folder, small = tmp_path_factory.mktemp("weights"), TINY_UNET
    models = {"vae": VAE(**TINY_VAE), "ddpm": DDPM(small), "hybrid": DiffuseVAE(TINY_VAE, small),
              "guided": DiffuseVAE(TINY_VAE, small, form=2, z_guidance=True, cond_dropout=0.1),
              "latent": LatentDiffusion(TINY_VAE, {"width": 8, "blocks": 1}),
              "vae16": VAE(**TINY_VAE | {"image_size": 16}),
              "features": FeatureNetwork("shapes", classes=3, factors=True)}
    return {name: save_model(randomised(model, 0.1), folder / f"{name}.safetensors") for name, model in models.items()}


@pytest.fixture
def photos(tmp_path):
    "A folder with twelve images, 40 x 36 pixels, and something else."
    folder, rng = tmp_path / "photos", np.random.default_rng(1)
    (folder / "more").mkdir(parents=True)
    for i in range(12):
        name = f"more/{i:02}.jpg" if i % 2 else f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def words_of(words):
    return [str(w) for word in words for w in (word.split() if isinstance(word, str) else [word])]


def command(*words):
    "What a command prints; it must succeed. Strings are split at spaces, paths are not."
    answer = CliRunner().invoke(app, words_of(words))
    assert answer.exit_code == 0, answer.output + repr(answer.exception)
    return answer.output


def sentence(capsys, monkeypatch, *words):
    "What the installed command says on the error stream: one sentence, with status 2."
    monkeypatch.setattr("sys.argv", ["hybridvae", *words_of(words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("hybridvae: ") and said.endswith(".\n") and said.count("\n") == 1, said
    assert not re.search(r"\.\s+[A-Z]", re.sub(r"\(.*\)", "", said)), said
    return said


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def arrays(images):
    "Images (N, 3, H, W) in [-1, 1] as they stand in an .npz file."
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def tile(picture, row, column, size=32):
    "One image of a grid, uint8 (3, size, size)."
    top, left = row * (size + 1), column * (size + 1)
    return torch.from_numpy(picture[top:top + size, left:left + size].copy()).permute(2, 0, 1)


# --- help -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_its_examples_parse(name):
    said = command(name, "--help")
    for parameter in COMMANDS[name].params:
        assert max(parameter.opts, key=len) in said or parameter.metavar in said
    examples = re.findall(r"^ +hybridvae (\S+) ?(.*)$", said, flags=re.M)
    assert 1 <= len(examples) <= 5
    for command_name, line in examples:
        assert command_name == name
        given = COMMANDS[name].make_context(name, shlex.split(line)).params  # parsed, not run; a mistake raises
        for shipped in filter(None, [given.get("weights"), given.get("vae")]):
            assert shipped.endswith(".safetensors") or (weights_folder() / f"{shipped}.safetensors").exists()
        for out in filter(None, [given.get("out")] if name in ("sample", "reconstruct", "interpolate") else []):
            check_target(out, grid_only=name != "sample")


def test_examples_name_experiments_that_there_are():
    for entries, pattern in (("shapes", "diffusevae-*"), ("shapes", "diffusevae-form1"),
                             ("cifar10", "diffusevae-form1-cpu")):
        assert selection.with_dependencies(selection.entries_of_every_size(entries), [pattern])


def test_a_seed_after_a_name_is_that_seed_alone_with_what_it_depends_on():
    entries = selection.entries_of_every_size("scenes")
    chosen = selection.with_dependencies(entries, ["diffusevae-form1@3"])
    assert {(e.experiment, e.seed) for e in chosen} == {("features", 0), ("vae", 3), ("diffusevae-form1", 3)}
    assert {e.seed for e in selection.matching(entries, ["ddpm", "vae@1"]) if e.experiment == "ddpm"} == set(range(5))
    for unknown in ("ddpm@9", "ddpm@x", "@1"):
        with pytest.raises(HybridVAEError, match=f"no experiment '{unknown}'.*@1 after a name"):
            selection.matching(entries, [unknown])


def test_help_answers_without_torch():
    program = ("import sys; from hybridvae.cli import app\n"
               f"for words in ([], *([c] for c in {list(COMMANDS)})):\n"
               "    app([*words, '--help'], standalone_mode=False)\n"
               "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS) + 1


def test_a_fresh_process_knows_the_models_of_all_stages(weights, tmp_path):
    line = ["sample", *"--cpu --n 1 --steps 1".split(), "--weights", str(weights["guided"]), "--out",
            str(tmp_path / "x.png")]
    program = ("from hybridvae.cli import app\n"
               "from hybridvae.custom import fitted_preset, new_model\n"
               "preset = fitted_preset('shapes', 'shapes', 32)\n"
               "new_model({'model': 'DiffuseVAE', 'vae': preset['vae'], 'unet': preset['unet']}, preset, 0)\n"
               f"app({line!r})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "x.png").exists(), done.stderr


def test_usage_errors_end_with_status_2():
    for line in ("run --nonsense", "run --minutes soon", "sample", "sample --weights x --n 0",
                 "sample --weights x --sampler euler", "train --dataset shapes --model gan",
                 "interpolate --weights x --n 1", "nothing"):
        answer = CliRunner().invoke(app, line.split())
        assert answer.exit_code == 2 and "Error:" in answer.output, line


# --- data -----------------------------------------------------------------------------------------------------------

def test_data_checks_and_describes(cache):
    said = command("data cifar10")
    assert "train: 60 images of 32 x 32 pixels, 10 classes" in said
    assert "of 50,000 images" in said and str(cache / "cifar10") in said
    assert "test: 100 images" in command("data shapes") and "nothing is stored" in command("data shapes")


def test_a_folder_becomes_a_data_set_that_other_commands_know(cache, photos, tiny, tmp_path):
    said = command("data folder --name flowers --image-size 32 --source", photos)
    assert "train: 11 images of 32 x 32" in said and "test: 1 images of 32 x 32" in said
    assert np.load(cache / "flowers" / "train_images.npy").shape == (11, 32, 32, 3)
    assert "train: 11 images" in command("data flowers")
    out = tmp_path / "own"
    said = command("train --dataset flowers --model vae --kimg 0.064 --batch-size 8 --cpu --out", out)
    assert load_model(out / "model.safetensors").config["z_dim"] == 4 and "preset cifar10" in said
    assert "flowers, 11" in json.loads((out / "training.json").read_text())["data"]


def test_celeba_from_the_official_files(cache, tmp_path):
    folder = tmp_path / "official" / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in (*range(1, 8), 162771, 162772):
        Image.new("RGB", (178, 218), (number % 256, 0, 0)).save(folder / f"{number:06}.jpg")
    said = command("data celeba64 --source", tmp_path / "official")
    assert "train: 7 images of 64 x 64" in said and "test: 2 images of 64 x 64" in said and "centre crop" in said


# --- run ------------------------------------------------------------------------------------------------------------

def test_run_without_a_name_lists_the_experiments_of_both_sizes():
    assert {"features", "vae", "ddpm", "diffusevae-form1"} <= set(command("run").split())
    assert {"vae", "vae-cpu", "diffusevae-form1-cpu"} <= set(command("run --dataset cifar10").split())


def test_run_stops_at_its_limit_continues_and_leaves_a_record(tiny, tmp_path):
    words = "run --dataset shapes --experiment ddpm --cpu --runs", tmp_path
    assert "the same command continues" in command(*words, "--minutes 0")
    assert not list(tmp_path.glob("*/*/seed0.json"))
    said = command(*words)
    record = json.loads((tmp_path / "shapes" / "ddpm" / "seed0.json").read_text())
    assert f"{record['evaluations'][0]['metrics']['FD (shapes)']['value']:.2f}" in said and "n = 60" in said
    model = load_model(tmp_path / "shapes" / "ddpm" / "seed0" / "model.safetensors")
    assert weights_hash(model) == record["weights_hash"]


def test_run_finds_entries_of_cpu_size(tiny, cache, tmp_path):
    command("run --dataset cifar10 --experiment vae-cpu --cpu --runs", tmp_path / "runs")
    record = json.loads((tmp_path / "runs" / "cifar10" / "vae-cpu" / "seed0.json").read_text())
    assert "FD (cifar)" in record["evaluations"][0]["metrics"]


# --- train ----------------------------------------------------------------------------------------------------------

def test_train_continues_to_the_same_weights_and_says_what_comes_next(tiny, tmp_path):
    words = "train --dataset shapes --model ddpm --cpu --seed 3 --out"
    assert "the same command continues" in command(words, tmp_path / "halves", "--minutes 0")
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    command(words, tmp_path / "halves")
    said = command(words, tmp_path / "whole")
    halves, whole = (load_model(tmp_path / name / "model.safetensors") for name in ("halves", "whole"))
    assert weights_hash(halves) == weights_hash(whole)
    note = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert note["weights_hash"] == weights_hash(whole) and note["seed"] == 3 and note["kimg"] == 0.128
    assert pixels(tmp_path / "whole" / "samples.png").shape == (65, 329, 3)  # two rows of ten
    name, *following = shlex.split(re.search(r"next: hybridvae (.*)", said)[1])
    COMMANDS[name].make_context(name, list(following))
    command(name, *following, "--cpu")
    assert pixels(tmp_path / "whole" / "more.png").shape == (263, 263, 3)


def test_train_makes_a_hybrid_of_a_given_vae_or_trains_one_first(tiny, weights, tmp_path):
    words = "train --dataset shapes --form 2 --z --cpu --out"
    command(words, tmp_path / "given", "--vae", weights["vae"])
    model = load_model(tmp_path / "given" / "model.safetensors")
    assert weights_hash(model.vae) == weights_hash(load_model(weights["vae"]))
    assert (model.form, model.z_guidance) == (2, True)
    command(words, tmp_path / "both")
    both = load_model(tmp_path / "both" / "model.safetensors")
    assert weights_hash(both.vae) == weights_hash(load_model(tmp_path / "both" / "vae" / "model.safetensors"))
    assert (tmp_path / "both" / "samples-pairs.png").exists()


def test_presets_fit_every_image_size():
    for size, name in ((32, "cifar10"), (64, "celeba64"), (128, "celeba256"), (256, "celeba256")):
        preset = custom.fitted_preset("", "flowers", size)
        assert preset["name"] == name
        ddpm = {"model": "DDPM", "unet": preset["unet"], "diffusion": preset["diffusion"]}
        for config in ({"model": "VAE", **preset["vae"]}, ddpm):
            with torch.device("meta"):
                assert custom.new_model(config, preset, 0).image_shape == (3, size, size)
    own = experiments.PRESETS["cifar10"]["unet"]
    assert custom.fitted_preset("", "cifar10", 32)["unet"] == own | {"image_size": 32}
    assert custom.fitted_preset("shapes", "flowers", 64)["unet"]["attention"] == [8]  # at the same level


# --- sample ---------------------------------------------------------------------------------------------------------

def test_samples_are_those_of_the_model_and_repeat_with_their_seed(weights, tmp_path):
    line = ("sample --cpu --n 5 --batch 3 --steps 3 --sampler ddim --weights", weights["hybrid"], "--out")
    for name, seed in (("a.npz", 4), ("again.npz", 4), ("other.npz", 5)):
        assert "5 images" in command(*line, tmp_path / name, "--seed", seed)
    a, again, other = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "again.npz", "other.npz"))
    assert a.dtype == np.uint8 and a.shape == (5, 32, 32, 3)
    assert np.array_equal(a, again) and not np.array_equal(a, other)
    model = load_model(weights["hybrid"])
    expected = torch.cat([model.sample(k, sampler="ddim", steps=3, generator=image_draws(4, i, i + k))
                          for i, k in ((0, 3), (3, 2))])
    assert np.array_equal(a, arrays(expected))


def test_samples_come_as_a_grid_as_arrays_or_as_files(weights, tmp_path):
    for name in ("x.npz", "x.png", "x.jpg", "files"):
        command("sample --cpu --n 5 --weights", weights["vae"], "--out", tmp_path / "new" / name)
    images, picture = np.load(tmp_path / "new" / "x.npz")["arr_0"], pixels(tmp_path / "new" / "x.png")
    assert picture.shape == (65, 98, 3) == pixels(tmp_path / "new" / "x.jpg").shape
    assert all(np.array_equal(tile(picture, i // 3, i % 3).permute(1, 2, 0), images[i]) for i in range(5))
    assert files_below(tmp_path / "new" / "files") == [f"0000{i}.png" for i in range(5)]
    assert all(np.array_equal(pixels(tmp_path / "new" / "files" / f"0000{i}.png"), images[i]) for i in range(5))


@pytest.mark.parametrize("numbers", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["vae", "hybrid"])
def test_exported_weights_hold_their_prior_and_need_no_images(weights, tmp_path, name, numbers):
    "A sample from the exported file is the one that --prior makes with the images at hand."
    fitted = "--cpu --prior ex-pde --dataset shapes --weights", weights[name], "--out"
    command("sample --n 4 --steps 2", *fitted, tmp_path / "a.npz")
    said = command("export --numbers", numbers, *fitted, tmp_path / "m.safetensors")
    assert f"{(tmp_path / 'm.safetensors').stat().st_size / 1e6:.1f} MB" in said
    command("sample --cpu --n 4 --steps 2 --weights", tmp_path / "m.safetensors", "--out", tmp_path / "b.npz")
    a, b = (np.load(tmp_path / f"{x}.npz")["arr_0"].astype(float) for x in "ab")
    assert np.abs(a - b).max() <= {"fp32": 0, "fp16": 3, "int8": 40, "int4": 80}[numbers] and a.std() > 3
    vae = getattr(load_model(tmp_path / "m.safetensors"), "vae", None) or load_model(tmp_path / "m.safetensors")
    assert isinstance(vae.prior, GaussianMixture)
    assert vae.config["prior"]["components"] == vae.prior.config["components"]


def test_ex_pde_draws_codes_from_the_mixture_of_the_training_codes(weights, tmp_path):
    fitted = "--prior ex-pde --dataset shapes --weights", weights["vae"]
    command("sample --cpu --n 4", *fitted, "--out", tmp_path / "x.npz")
    vae = load_model(weights["vae"])
    mixture = fit_mixture(vae.codes(data.load_data("shapes")), 20, 0)
    expected = arrays(vae.decode(mixture.sample(4, image_draws(0, 0, 4))).detach())
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], expected)


def test_the_guidance_weight_reaches_the_sampler(weights, tmp_path):
    for weight in (0, 1, 3):
        command("sample --cpu --n 2 --steps 2 --weights", weights["guided"], "--guidance-weight", weight,
                "--out", tmp_path / f"{weight}.npz")
    found = [np.load(tmp_path / f"{weight}.npz")["arr_0"] for weight in (0, 1, 3)]
    expected = load_model(weights["guided"]).sample(2, steps=2, guidance_weight=3.0, generator=image_draws(0, 0, 2))
    assert np.array_equal(found[2], arrays(expected))
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


NEW_MODEL = """
from torch import nn, zeros
from hybridvae.core import Model

class OfANewStage(Model):
    def __init__(self):
        super().__init__()
        self.config, self.weight = {"model": "OfANewStage"}, nn.Parameter(zeros(1))

    def sample(self, n, **options): ...
"""


def test_weights_of_a_new_stage_are_opened_once_it_has_a_table(tmp_path, monkeypatch):
    (tmp_path / "zz_new_model.py").write_text(NEW_MODEL)
    monkeypatch.setattr(hybridvae, "__path__", [*hybridvae.__path__, str(tmp_path)])
    monkeypatch.setitem(experiments.TABLES, "zz_new_model", ())
    path = tmp_path / "new.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"config": '{"model": "OfANewStage"}'})
    try:
        assert type(generators.load_generator(str(path), cpu=True)).__name__ == "OfANewStage"
    finally:
        core.MODELS.pop("OfANewStage", None)
        sys.modules.pop("hybridvae.zz_new_model", None)
        vars(hybridvae).pop("zz_new_model", None)


def test_shipped_weights_have_names(tmp_path):
    shipped = load_model(weights_folder() / "scenes-diffusevae.safetensors")
    assert shipped.config == generators.load_generator("scenes-diffusevae", cpu=True).config


# --- reconstruct and interpolate ------------------------------------------------------------------------------------

def test_reconstructions_stand_below_their_images(weights, photos, tmp_path):
    out = tmp_path / "r.png"
    said = command("reconstruct --cpu --steps 2 --n 3 --weights", weights["hybrid"], "--images", photos, "--out", out)
    assert "3 images" in said and "image, x̂, refinement" in said
    picture = pixels(out)
    assert picture.shape == (98, 98, 3)
    first = Image.open(photos / "00.png").resize((32, 32), Image.Resampling.LANCZOS, box=(2, 0, 38, 36))
    assert np.array_equal(tile(picture, 0, 0).permute(1, 2, 0), np.asarray(first))
    model = load_model(weights["hybrid"])
    x = torch.stack([tile(picture, 0, i) for i in range(3)]).float() / 127.5 - 1
    x_hat, refined = map(to_uint8, model.reconstruct(x, steps=2, generator=image_draws(0, 0, len(x))))
    for row, images in ((1, x_hat), (2, refined)):
        assert all(torch.equal(tile(picture, row, i), images[i]) for i in range(3))


def test_reconstructions_of_the_held_out_part_and_of_a_vae(weights, tmp_path):
    out = tmp_path / "r.png"
    command("reconstruct --cpu --n 4 --dataset shapes --weights", weights["vae"], "--out", out)
    picture = pixels(out)
    assert picture.shape == (65, 131, 3)  # no refinement
    test = data.load_data("shapes", "test").tensor()
    assert all(torch.equal(tile(picture, 0, i), test[i]) for i in range(4))


def test_a_path_of_codes_holds_the_noise(weights, tmp_path):
    out = tmp_path / "i.png"
    command("interpolate --cpu --steps 2 --n 5 --seeds 7 8 --seed 9 --weights", weights["hybrid"], "--out", out)
    picture, model = pixels(out), load_model(weights["hybrid"])
    a, b = (torch.randn(1, 4, generator=generator(s)) for s in (7, 8))
    z = torch.cat([slerp(a, b, t) for t in (0, 0.25, 0.5, 0.75, 1)])
    noise = torch.randn(1, 3, 32, 32, generator=generator(9))
    refined = model.refine(model.vae.decode(z), z, noise=noise.expand(5, -1, -1, -1), steps=2)
    for row, images in enumerate((model.vae.decode(z), refined)):
        assert all((tile(picture, row, i).int() - to_uint8(images)[i].int()).abs().max() <= 1 for i in range(5))


def test_a_path_of_noises_holds_the_code(weights, tmp_path):
    out = tmp_path / "i.png"
    path = "--n 3 --vary noise --seeds 7 8 --seed 9"
    command("interpolate --cpu --steps 2", path, "--weights", weights["hybrid"], "--out", out)
    picture, model = pixels(out), load_model(weights["hybrid"])
    assert torch.equal(tile(picture, 0, 0), tile(picture, 0, 2))
    assert not torch.equal(tile(picture, 1, 0), tile(picture, 1, 2))
    z, noise = torch.randn(1, 4, generator=generator(9)), torch.randn(1, 3, 32, 32, generator=generator(8))
    last = to_uint8(model.refine(model.vae.decode(z), z, noise=noise, steps=2))[0]
    assert (tile(picture, 1, 2).int() - last.int()).abs().max() <= 1


def test_a_path_between_two_images_begins_and_ends_with_their_reconstructions(weights, photos, tmp_path):
    ends = photos / "00.png", photos / "02.png"
    command("interpolate --cpu --n 3 --weights", weights["vae"], "--images", *ends, "--out", tmp_path / "i.png")
    command("reconstruct --cpu --weights", weights["vae"], "--images", ends[0], "--images", ends[1],
            "--out", tmp_path / "r.png")
    path, reconstructions = pixels(tmp_path / "i.png"), pixels(tmp_path / "r.png")
    for on_path, number in ((0, 0), (2, 1)):
        assert (tile(path, 0, on_path).int() - tile(reconstructions, 1, number).int()).abs().max() <= 1


def test_latent_diffusion_has_one_row_and_paths_of_its_own_codes_and_noises(weights, tmp_path):
    model, out = load_model(weights["latent"]), tmp_path / "l.png"
    command("reconstruct --cpu --n 3 --steps 2 --dataset shapes --weights", weights["latent"], "--out", out)
    assert pixels(out).shape == (65, 98, 3)  # image and x̂, no refinement
    close = lambda picture, i, image: (tile(picture, 0, i).int() - to_uint8(image)[0].int()).abs().max() <= 1
    said = command("interpolate --cpu --n 3 --steps 3 --seeds 7 8 --weights", weights["latent"], "--out", out)
    assert "refinement" not in said
    assert close(pixels(out), 2, model.vae.decode(model.latent.sample(1, generator(8), steps=3)))
    command("interpolate --cpu --n 3 --steps 2 --vary noise --seeds 7 8 --weights", weights["latent"], "--out", out)
    assert close(pixels(out), 0, model.vae.decode(model.latent.sample(1, generator(7), steps=2)))


def test_a_hybrid_of_both_refines_as_often_as_asked(weights, tmp_path):
    model = LatentDiffuseVAE(TINY_VAE, TINY_UNET, denoiser={"width": 8, "blocks": 1})
    file = save_model(randomised(model, 0.1), tmp_path / "both.safetensors")
    for k in (0, 2):
        command("sample --cpu --n 2 --steps 2 --refine-steps", k, "--weights", file, "--out", tmp_path / f"{k}.npz")
        want = arrays(load_model(file).sample(2, steps=2, refine_steps=k, generator=image_draws(0, 0, 2)))
        assert np.abs(np.load(tmp_path / f"{k}.npz")["arr_0"].astype(int) - want.astype(int)).max() <= 1


def test_latent_diffusion_samples_and_takes_another_prior(weights, tmp_path):
    command("sample --cpu --n 2 --steps 2 --weights", weights["latent"], "--out", tmp_path / "own.npz")
    command("sample --cpu --n 2 --steps 2 --prior ex-pde --dataset shapes --weights", weights["latent"],
            "--out", tmp_path / "other.npz")
    own, other = (np.load(tmp_path / name)["arr_0"] for name in ("own.npz", "other.npz"))
    want = arrays(load_model(weights["latent"]).sample(2, steps=2, generator=image_draws(0, 0, 2)))
    largest = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max()
    assert largest(own, want) <= 1 and largest(own, other) > 1


# --- evaluate -------------------------------------------------------------------------------------------------------

def test_evaluate_measures_what_sample_draws(weights, tmp_path):
    said = command("evaluate --cpu --dataset shapes --n 20 --steps 2 --batch 20 --weights", weights["ddpm"],
                   "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    value = found["metrics"]["FD (shapes)"]["value"]
    assert f"{value:.4f}" in said and "n = 20" in said and "held-out, 100 images" in said and "FID" not in said
    images = to_uint8(load_model(weights["ddpm"]).sample(20, steps=2, generator=image_draws(0, 0, 20)))
    network = load_features("shapes")
    expected = frechet_distance(extract(network, images), extract(network, data.load_data("shapes", "test").tensor()))
    assert value == pytest.approx(expected, rel=1e-4)
    assert found["weights_hash"] == weights_hash(load_model(weights["ddpm"])) and found["nfe"] == 2


def test_evaluate_images_that_are_there(weights, tmp_path):
    test = data.load_data("shapes", "test")
    np.savez(tmp_path / "real.npz", arr_0=test.images)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(test.images):
        Image.fromarray(image).save(tmp_path / "real" / f"{i:03}.png")
    words = "evaluate --cpu --dataset shapes --images"
    by_file, by_folder = (command(words, tmp_path / name, "--json", tmp_path / "m.json")
                          for name in ("real.npz", "real"))
    assert by_file.splitlines()[1:] == by_folder.splitlines()[1:]
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert abs(metrics["FD (shapes)"]["value"]) < 1e-3  # they are the reference
    assert metrics["precision (shapes)"]["value"] == 1
    other = command(words, tmp_path / "real.npz", "--n 50 --features", weights["features"])
    assert "n = 50" in other and other.splitlines()[1:] != by_file.splitlines()[1:]


def test_the_networks_that_measure(weights, monkeypatch):
    monkeypatch.setattr(generators, "load_inception", lambda path, device: ("inception", path))
    def names(*options):
        networks = generators.measuring_networks(*options, torch.device("cpu"))
        return [getattr(network, "name", network) for network in networks]

    assert names("shapes", "", None) == ["shapes"] == names("flowers", "shapes", None)
    assert names("flowers", str(weights["features"]), None) == ["shapes"]
    assert names("shapes", "", "w.pth") == ["shapes", ("inception", "w.pth")]
    assert names("flowers", "", "w.pth") == [("inception", "w.pth")]  # it has no network of its own


# --- campaign -------------------------------------------------------------------------------------------------------

def test_campaign_runs_what_is_missing_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("hybridvae.records.results_folder", lambda: tmp_path / "none")
    words = "campaign --cpu --dataset shapes --experiment vae --runs", tmp_path / "runs"
    assert "0 of 2 entries recorded, 2 to be trained, 0 trained and to be measured" in command(*words, "--list")
    assert "0 of 2" in command(*words, "--minutes 0")
    assert ("2 of 2 entries recorded, 0 to be trained, 0 trained and to be measured; the same command continues."
            in command(*words))
    written = (tmp_path / "runs" / "shapes" / "vae" / "seed0.json").stat().st_mtime_ns
    assert "recorded: " not in command(*words)
    assert (tmp_path / "runs" / "shapes" / "vae" / "seed0.json").stat().st_mtime_ns == written
    listed = command(*words, "--list")
    assert re.search(r"shapes +vae +recorded", listed)


def test_what_is_recorded_and_only_depended_on_is_not_measured_again():
    "Its weights may be gone, and to complete its record would train it again."
    entries = campaigns.queue("cifar10")
    of = lambda *patterns: {(e.experiment, e.seed): e for e in selection.with_dependencies(entries, patterns)}
    parent, child = ("diffusevae-form1-z", 0), ("pca-sampling", 0)
    one, both = of("pca-sampling"), of("pca-sampling", "diffusevae-form1-z@0")
    assert one[parent].evaluations == one[parent].studies == () and one[parent].config == both[parent].config
    assert both[parent].studies and both[parent].evaluations and one[child] == both[child] and one[child].evaluations
    new = of("diffusevae-form2@1")["vae", 1]  # without a record
    assert new.evaluations and new.studies


def test_a_filter_keeps_what_is_depended_on():
    entries = campaigns.queue("cifar10")
    picked = selection.with_dependencies(entries, ["diffusevae-form2*"])
    names = {e.experiment for e in picked}
    assert {"features", "vae", "diffusevae-form2", "diffusevae-form2-z"} <= names
    assert not {"ddpm", "diffusevae-form1"} & names
    key = lambda e: (e.experiment, e.seed)
    assert [*map(key, picked)] == [key(e) for e in entries if key(e) in {*map(key, picked)}]  # in their order
    seeds = lambda name: {e.seed for e in picked if e.experiment == name}
    assert seeds("vae") == seeds("diffusevae-form2")


def test_a_dry_run_says_what_it_changes(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("campaign --dry-run --dataset cifar10-cpu --experiment features")
    for name, value in campaigns.TINY.items():
        assert f"{name} {value:g}" in said
    assert "1 of 1 entries came through" in said and files_below(tmp_path) == []


# --- bench ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def shrunk(monkeypatch):
    "All experiments as in a dry run."
    queue = campaigns.queue
    for module in (campaigns, selection):
        monkeypatch.setattr(module, "queue", lambda *names: [campaigns.shrink(e) for e in queue(*names)])


def test_profile_prints_tables_and_writes_traces_and_the_memory(shrunk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("bench profile --cpu --steps 2 --batch 3")
    names = ("ddpm", "diffusevae-form1", "latent", "latent-mlp")
    traces = [f"profiles/{name}-{what}.json.gz" for name in names for what in ("sampling", "training-step")]
    assert files_below(tmp_path) == sorted(["profiles", "profiles/memory.png", *traces])
    assert pixels(tmp_path / "profiles" / "memory.png").std() > 0
    for name in names:
        assert re.search(rf"^{name}, training step: [\d,]+ ms, at most [\d.]+ MiB", said, flags=re.M)
        assert f"{name}, sampling: " in said
    assert said.count("aten::convolution_backward") == 3  # once for each training step, but for that of the MLP
    assert re.search(r"^sampling: ms per image( +[\d.]+){4}$", said, flags=re.M)
    assert re.search(r"^GFLOP per sample( +[\d.]+){4}$", said, flags=re.M)


def test_profile_takes_patterns_without_dependencies_or_feature_networks_and_seed_0_alone(tmp_path, monkeypatch):
    profiled = []

    def profile_entry(entry, *options):
        profiled.append((entry.experiment, entry.seed, *options))
        call = Profile("cpu", 0.001, 0.001, [], [(0.0, 0)])
        return {"sampling": call}, {"experiment": entry.experiment, "GFLOP": 1.0}
    monkeypatch.setattr(benches, "profile_entry", profile_entry)
    patterns = "--experiment features* --experiment diffusevae-form[1]"
    command("bench profile --cpu --dataset cifar10 --sampler ddim --steps 2", patterns, "--out", tmp_path / "x")
    assert profiled == [("diffusevae-form1", 0, None, "ddim", 2, tmp_path / "x", True)]


def test_bench_compares_with_peers_and_keeps_the_other_part(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "STARTS", {"python": ["-c", "pass"]})
    monkeypatch.setattr(benches, "TINY", dataclasses.replace(benches.TINY, images=20, inputs=128))
    monkeypatch.chdir(tmp_path)
    core.write_json(tmp_path / "bench.json", {"growth": {"rows": []}})
    said = command("bench --tiny --rounds 1 --batch 2 --cpu")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["growth"] == {"rows": []} and (found["peers"]["batch"], found["peers"]["rounds"]) == (2, 1)
    assert re.search(r"^hybridvae +fp32 +eager", said, flags=re.M)
    assert "training, fp32: times diffusers" in said and "written to bench.json" in said


def test_bench_growth_writes_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "TINY_GROWTH", {"batch": (1, 2)})
    said = command("bench growth --tiny --rounds 1 --cpu --out", tmp_path / "b.json")
    found = json.loads((tmp_path / "b.json").read_text())
    assert list(found) == ["growth"] and [r["batch"] for r in found["growth"]["rows"]] == [1, 2]
    assert "gflop_per_call" in said


def test_bench_times_what_matches(shrunk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("bench times --experiment ddpm --experiment joint-none --batch 2 --rounds 1 --cpu")
    found = json.loads((tmp_path / "times-shapes.json").read_text())
    assert {r["experiment"] for r in found["rows"]} == {"ddpm", "joint-none"}
    assert (found["batch"], found["rounds"]) == (2, 1)
    assert re.search(r"ddpm +sampler dpmpp, steps 3 +3 ", said) and "written to times-shapes.json" in said


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    "Random weights of Inception's layout that pass as the published ones; images and features are small."
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = inception_stand_in(tmp_path / metrics.INCEPTION_FILE)
    both = metrics.InceptionNetwork.both
    few = lambda self, images: (both(self, images)[0][:, :32], both(self, images)[1])  # 2,048 take a minute
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(metrics.InceptionNetwork, "both", few)
    monkeypatch.setattr(metrics.InceptionNetwork, "num_features", 32)
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_fid_and_is_are_added_to_records_whose_weights_are_there(tiny, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybridvae.records.results_folder", lambda: tmp_path / "none")
    experiments.PRESETS["shapes"]["n"] = 100  # the fewest of a score
    words = "campaign --cpu --dataset shapes --experiment vae --runs", tmp_path / "runs"
    command(*words)
    path = tmp_path / "runs" / "shapes" / "vae" / "seed0.json"
    before = json.loads(path.read_text())
    said = command(*words, "--standard", stand_in)
    assert "measured: shapes vae seed 0" in said and "added to 1 records" in said
    after = json.loads(path.read_text())
    main, old = after["evaluations"][0], before["evaluations"][0]
    added = {name: main["metrics"].pop(name) for name in main["metrics"].keys() - old["metrics"].keys()}
    assert main == old and after["evaluations"][1:] == before["evaluations"][1:]  # nothing else has changed
    assert {"FID", "FID to held-out", "KID", "IS"} <= added.keys()
    assert all(m["feature_network"] == "inception" and m["hash"] and m["drawn_again_on"] for m in added.values())
    assert added["FID"]["reference"] == "training set, 200 images" and added["IS"]["n"] == main["n"] == 100
    assert "added to 0 records" in command(*words, "--standard", stand_in)  # once is enough
    assert not list(path.with_suffix("").glob("images-*"))
    (path.with_suffix("") / "model.safetensors").rename(tmp_path / "elsewhere")
    assert "no trained weights" in sentence(capsys, monkeypatch, *words, "--experiment ddpm --standard", stand_in)


def test_only_the_published_weights_add_a_fid(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", "0")
    words = "campaign --cpu --dataset shapes --runs", tmp_path, "--standard"
    assert metrics.INCEPTION_FILE in sentence(capsys, monkeypatch, *words, stand_in)
    assert "there is no file" in sentence(capsys, monkeypatch, *words, tmp_path / "none.pth")
    assert "--list and --standard" in sentence(capsys, monkeypatch, *words, stand_in, "--list")


# --- rate -----------------------------------------------------------------------------------------------------------

def test_rate_writes_pictures_without_names_and_counts_choices(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rating"
    said = command("rate --n 6 --experiment vae --experiment ddpm --out", out)
    assert str(out / "rate.html") in said and (out / "key.json").exists()
    blank = (out / "choices.csv").read_text().splitlines()
    (out / "choices-me.csv").write_text("\n".join([blank[0], "1,a,b,equal,me", "2,a,a,a,me"]))
    said = command("rate --table --out", out)
    assert "Rated by: me (2 pairs)" in said and "decided" in said
    assert "--n" in sentence(capsys, monkeypatch, "rate --table --n 5 --out", out)


# --- report ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A clone in which only the feature network is recorded: records of other sizes stay out of the report."
    here, there = core.project_root(), tmp_path / "clone"
    shutil.copytree(here / "hybridvae", there / "hybridvae", ignore=shutil.ignore_patterns("__pycache__"))
    records = Path("nbs", "results", report.STUDIED, "features")
    shutil.copytree(here / records, there / records)
    for name in ("07_report.ipynb", "refs.bib"):
        shutil.copy(here / "nbs" / name, there / "nbs")
    monkeypatch.setattr(report, "project_root", lambda: there)
    monkeypatch.setenv("PYTHONPATH", str(there))
    monkeypatch.setenv("HYBRIDVAE_RUNS", str(tmp_path))  # the report leaves it aside


def test_report_over_a_fresh_study(tiny, clone, tmp_path):
    experiments.PRESETS["scenes"]["n_curve"] = 60
    said = command("report --cpu --runs", tmp_path)
    html = (tmp_path / "report" / "report.html").read_text()
    assert said.strip().endswith("report.html")
    text = re.sub(r"<(script|style).*?</\1>|<[^>]+>|data:image[^\"]+", " ", html, flags=re.S)
    assert "Figure 1" in text and "Kingma" in text and "Table 1" in text
    assert "<math" in html and "$" not in text and "<script" not in html  # formulas, and all else, without a network
    assert not re.search(r"(src|href)=.https?:", html) and html.count('id="show-code"') == 1
    assert not re.search(r"@(fig|tbl|sec)-|\[@|\{#", text)  # every reference is resolved
    record = json.loads((tmp_path / "scenes" / "diffusevae-form1-short" / "seed0.json").read_text())
    values = record["evaluations"][0]["metrics"]
    results, own = text.split("Your run beside the records")[-2:]
    number = f"{values['FD (scenes)']['value']:,.2f}"
    assert number in own and number not in results  # the numbers of this run stand in their own section
    assert all(name in own for name in ("VAE, short", "DDPM, short", "form 1, short"))


def test_report_trains_its_three_entries_and_takes_complete_records_as_they_are(tmp_path, monkeypatch):
    asked, written, entries = [], {}, report.study_entries()
    vae = entries[0]
    written[vae.experiment] = {"config": vae.config, "evaluations": list(vae.evaluations)}
    monkeypatch.setattr("hybridvae.records.recorded", lambda entry, *roots: written.get(entry.experiment))
    monkeypatch.setattr(runs, "run_entry", lambda entry, *rest, **options: asked.append(entry) or {})
    monkeypatch.setattr(selection, "summary", lambda record, runs: "")
    monkeypatch.setattr(report, "render_report", lambda runs: runs)
    command("report --runs", tmp_path)
    assert asked == entries[1:] and [e.experiment for e in entries] == list(report.STUDY)
    assert {(e.dataset, e.seed) for e in entries} == {(report.STUDIED, 0)}


def test_an_unknown_reference_is_an_error():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("see @fig-nowhere")])
    with pytest.raises(KeyError):
        resolve_references(nb, {})


def test_the_bibliography_is_read_whole():
    text = (results_folder().parent / "refs.bib").read_text()
    found = read_bibliography(text)
    assert len(found) == len(re.findall(r"^@", text, flags=re.M))
    assert all({"author", "title", "year"} <= set(fields) for fields in found.values())


def test_a_page_is_printed_by_a_browser_that_is_there(tmp_path, monkeypatch):
    page, calls = tmp_path / "report.html", []
    page.write_text("<p>here</p>")

    def run(words, **options):
        calls.append(words)
        target = Path(next(w for w in words if w.startswith("--print-to-pdf=")).partition("=")[2])
        target.write_bytes(b"%PDF")
        return subprocess.CompletedProcess(words, 0)
    monkeypatch.setattr(report.shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    monkeypatch.setattr(report.subprocess, "run", run)
    assert report.print_pdf(page).read_bytes() == b"%PDF" and calls[0][0] == "/bin/google-chrome"
    assert calls[0][-1] == page.as_uri()
    monkeypatch.setattr(report.shutil, "which", lambda name: None)
    with pytest.raises(HybridVAEError, match="Chromium or Chrome"):
        report.print_pdf(page)


def test_sections_are_numbered_and_references_lead_to_their_place():
    cells = [nbformat.v4.new_markdown_cell(text) for text in (
        "# Title", "## A {#sec-a}\n\n### B {#sec-b}\n\nsee @sec-c and @sec-b", "### B2\n\n## C {#sec-c}\n\n### D")]
    nb = resolve_references(nbformat.v4.new_notebook(cells=cells), {})
    text = "\n".join(cell.source for cell in nb.cells)
    assert re.findall(r"^##+ (.*)$", text, flags=re.M) == ["1 A", "1.1 B", "1.2 B2", "2 C", "2.1 D"]
    assert "see [Section 2](#sec-c) and [Section 1.1](#sec-b)" in text and '<a id="sec-c"></a>' in text


def test_formulas_become_mathml_and_code_stays():
    text = report.with_mathml("a $x_t$ b `$HOME` and $$y \\tag{3}$$\n```\n$z$\n```")
    assert text.count("<math") == 2 and "`$HOME`" in text and "$z$" in text and "(3)" in text and "tag" not in text


def test_report_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    with pytest.raises(HybridVAEError, match="needs a clone"):
        render_report(tmp_path)


# --- mistakes -------------------------------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, weights, photos, cache, monkeypatch):
    "A folder with things that can be mistaken for others, in which the commands run."
    monkeypatch.chdir(tmp_path)
    for name, path in weights.items():
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "here.txt").touch()
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "named.npz", images=np.zeros((20, 32, 32, 3), np.uint8))
    return tmp_path


MISTAKES = [
    ("data imagenet", r"'imagenet'.*choose from shapes, scenes, cifar10"),
    ("data folder --source photos", "--name"),
    ("data folder --source nowhere --name flowers", "nowhere"),
    ("data folder --source photos --name flowers --image-size 33", "33"),
    ("data folder --source photos --name flowers --image-size 64", "smaller than 64"),
    ("data shapes --source photos", "--source"),
    ("data flowers --source photos", "folder"),
    ("data celeba64 --image-size 64", "--image-size"),
    ("data celeba64 --source photos", "img_align_celeba"),
    ("run --dataset imagenet --experiment vae", r"'imagenet'.*choose from shapes, scenes, cifar10"),
    ("run --experiment gan", r"'gan'.*choose from .*ddpm"),
    ("run --experiment vae --seed 7", "seed 7"),
    ("run --experiment vae --runs file", "file"),
    ("train --dataset imagenet", "imagenet"),
    ("train --dataset shapes --preset huge", r"'huge'.*choose from shapes"),
    ("train --dataset shapes --preset cifar10 --small", "--preset"),
    ("train --dataset shapes --model vae --form 2", "--form"),
    ("train --dataset shapes --model ddpm --no-z", "--z"),
    ("train --dataset shapes --model ddpm --vae vae.safetensors", "--vae"),
    ("train --dataset shapes --vae ddpm.safetensors", "ddpm.safetensors is no VAE"),
    ("train --dataset shapes --vae vae16.safetensors", "32 x 32"),
    ("train --dataset shapes --model vae --kimg 0", "kimg"),
    ("train --dataset shapes --model vae --batch-size 12", "12"),
    ("train --dataset shapes --model vae --out file", "file"),
    ("sample --weights scenes-diffusevae --refine-steps 2", "--refine-steps.*LatentDiffuseVAE.*VAE: leave it out"),
    ("sample --weights nothing", r"'nothing'.*scenes-diffusevae, scenes-latent\."),
    ("sample --weights empty", "empty is a folder"),
    ("sample --weights broken.safetensors", "broken"),
    ("sample --weights features.safetensors", "no images"),
    ("sample --weights shapes-features", "no images"),
    ("sample --weights hybrid.safetensors --steps 0", "steps is 0: choose from 1 to 1000"),
    ("sample --weights hybrid.safetensors --steps 1001", "steps is 1001"),
    ("sample --weights hybrid.safetensors --guidance-weight 2", "cond_dropout"),
    ("sample --weights vae.safetensors --guidance-weight 2", "cond_dropout"),
    ("sample --weights vae.safetensors --prior ex-pde", "--dataset"),
    ("sample --weights vae.safetensors --dataset shapes", "--prior"),
    ("sample --weights ddpm.safetensors --prior ex-pde --dataset shapes", "latent code"),
    ("sample --weights vae16.safetensors --prior ex-pde --dataset shapes", "16 x 16"),
    ("sample --weights vae.safetensors --out x.bmp", "x.bmp"),
    ("sample --weights vae.safetensors --out file/x.png", "file"),
    ("sample --weights vae.safetensors --out file", "file is there already"),
    ("sample --weights vae.safetensors --out full", "full is there already"),
    ("reconstruct --weights hybrid.safetensors", "--images or from --dataset"),
    ("reconstruct --weights hybrid.safetensors --images photos --dataset shapes", "one of the two"),
    ("reconstruct --weights hybrid.safetensors --images nowhere.png", "nowhere.png"),
    ("reconstruct --weights hybrid.safetensors --images broken.png", "broken.png"),
    ("reconstruct --weights hybrid.safetensors --images empty", "empty holds no images"),
    ("reconstruct --weights hybrid.safetensors --dataset cifar10 --n 61", "61"),
    ("reconstruct --weights ddpm.safetensors --dataset shapes", "latent code"),
    ("reconstruct --weights vae16.safetensors --dataset shapes", "16 x 16"),
    ("reconstruct --weights hybrid.safetensors --dataset shapes --steps 0", "steps is 0"),
    ("reconstruct --weights hybrid.safetensors --dataset shapes --out x.npz", "x.npz"),
    ("interpolate --weights ddpm.safetensors", "latent code"),
    ("interpolate --weights vae.safetensors --vary noise", "no noise"),
    ("interpolate --weights hybrid.safetensors --images photos/00.png photos/02.png --vary noise", "--images"),
    ("interpolate --weights hybrid.safetensors --images photos/00.png photos/02.png --seeds 1 2", "--seeds"),
    ("interpolate --weights hybrid.safetensors --images photos/00.png nowhere.png", "nowhere.png"),
    ("interpolate --weights hybrid.safetensors --out empty", "empty"),
    ("evaluate --dataset shapes", "one of the two"),
    ("evaluate --dataset shapes --weights vae.safetensors --images photos", "one of the two"),
    ("evaluate --dataset shapes --images photos", "40 x 36"),
    ("evaluate --dataset shapes --images small.npz", "16, 16"),
    ("evaluate --dataset shapes --images few.npz", "3 images"),
    ("evaluate --dataset shapes --images named.npz", "arr_0"),
    ("evaluate --dataset shapes --images file", "file"),
    ("evaluate --dataset shapes --images nowhere", "nowhere"),
    ("evaluate --dataset shapes --images photos --steps 5", "--steps"),
    ("evaluate --dataset shapes --weights vae16.safetensors", "16 x 16"),
    ("evaluate --dataset shapes --weights hybrid.safetensors --steps 0", "steps is 0"),
    ("evaluate --dataset shapes --weights vae.safetensors --features nothing", "nothing"),
    ("evaluate --dataset shapes --weights vae.safetensors --features ddpm.safetensors", "measures nothing"),
    ("evaluate --dataset shapes --weights vae.safetensors --inception nowhere.pth", "nowhere.pth"),
    ("evaluate --dataset shapes --weights vae.safetensors --json empty", "empty is a folder"),
    ("evaluate --dataset shapes --weights vae.safetensors --json file/m.json", "file"),
    ("campaign --dataset imagenet", "imagenet"),
    ("campaign --dataset shapes --experiment gan", r"'gan'.*choose from"),
    ("campaign --list --dry-run", "--dry-run and --list"),
    ("campaign --train --measure", "--train and --measure"),
    ("export --weights vae.safetensors --out model.bin", "model.bin.*safetensors"),
    ("export --weights vae.safetensors --prior ex-pde --out m.safetensors", "--prior and --dataset go together"),
    ("export --weights ddpm.safetensors --prior ex-pde --dataset shapes --out m.safetensors",
     "ex-pde needs a latent code"),
    ("campaign --list --minutes 3", "--minutes"),
    ("bench profile --dataset imagenet", "imagenet"),
    ("bench profile --experiment gan", r"'gan'.*choose from .*ddpm"),
    ("bench profile --experiment features", "feature networks"),
    ("bench profile --experiment ddpm --steps 0 --cpu", "steps is 0"),
    ("bench profile --out file", "file is a file"),
    ("bench profile --rounds 3", "--rounds does not go with bench profile"),
    ("bench --experiment ddpm", "--experiment does not go with bench peers"),
    ("bench growth --batch 3", "--batch does not go with bench growth"),
    ("bench times --tiny", "--tiny does not go with bench times"),
    ("bench times --steps 3", "--steps does not go with bench times"),
    ("bench times --dataset imagenet", "imagenet"),
    ("bench times --experiment features", "feature networks"),
    ("bench times --out empty", "empty is a folder"),
    ("bench --out file", "file is not a result of"),
    ("bench growth --out empty", "empty is a folder"),
]


@pytest.mark.parametrize("line, says", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_leaves_nothing(line, says, place, capsys, monkeypatch):
    before = files_below(place)
    assert re.search(says, sentence(capsys, monkeypatch, line))
    assert files_below(place) == before


def numbers_of(name):
    "The options of a command that are numbers: name, option, how many, whether whole."
    hints = typing.get_type_hints(getattr(cli, name))
    for parameter in COMMANDS[name].params:
        kinds = typing.get_args(hints[parameter.name]) or (hints[parameter.name],)
        if int in kinds or float in kinds:
            yield parameter.name, max(parameter.opts, key=len), parameter.nargs, int in kinds


NUMBERS = [(command, *number) for command in COMMANDS for number in numbers_of(command)]


@pytest.mark.parametrize("words, name, option, count, whole", NUMBERS, ids=[f"{n[0]} {n[2]}" for n in NUMBERS])
def test_numbers_that_cannot_be_are_refused_before_any_work(words, name, option, count, whole):
    "Too large for a generator, not a number, or without end: of every number of every command, while it is parsed."
    for parameter in COMMANDS[words.split()[0]].params:
        if parameter.required:
            words += f" {parameter.opts[-1] if parameter.param_type_name == 'option' else ''} nothing"
    for value in (*(["9" * 20, "4294967296"] if whole else ["nan", "inf", "-inf"]), *["-1"] * ("seed" in name)):
        answer = CliRunner().invoke(app, [*words.split(), option, *[value] * count])
        assert answer.exit_code == 2 and "Invalid value for" in answer.output and option in answer.output, answer.output


def test_every_command_takes_the_largest_seed(weights, tiny, tmp_path):
    "A seed that is accepted is good for every generator that a command uses, scikit-learn's among them."
    seed = f"--seed {cli.LARGEST} --cpu"
    command("train --dataset shapes --model vae", seed, "--out", tmp_path / "run")
    command("sample --n 2 --prior ex-pde --dataset shapes --weights", weights["vae"], seed, "--out", tmp_path / "x.npz")
    command("interpolate --steps 1 --n 2 --weights", weights["hybrid"], seed, f"--seeds 0 {cli.LARGEST}",
            "--out", tmp_path / "z.png")


def test_a_preset_that_does_not_fit_names_all_that_do(cache, tmp_path, capsys, monkeypatch):
    "Every size that `data folder` accepts can be trained on: with what the sentence names, too."
    assert all(custom._suits("shapes", size) for size in (16, 24, 56, 104, 224, 1000))
    (cache / "large").mkdir()
    for split in ("train", "test"):
        np.save(cache / "large" / f"{split}_images.npy", np.zeros((8, 56, 56, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    said = sentence(capsys, monkeypatch, "train --dataset large --model vae --cpu")
    named = re.findall("--preset ([a-z0-9-]+)", said)
    assert "56 x 56" in said and {"shapes", "cifar10"} <= set(named) and "celeba64" not in named
    for name in named:
        preset = custom.fitted_preset(name, "large", 56)
        with torch.device("meta"):
            assert custom.new_model({"model": "VAE", **preset["vae"]}, preset, 0).image_shape == (3, 56, 56)
            custom.new_model({"model": "DDPM", "unet": preset["unet"]}, preset, 0)
    assert files_below(tmp_path / "large-vae") == []


def test_a_full_memory_gets_one_sentence(weights, tmp_path, capsys, monkeypatch):
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                                              "memory: you tried to allocate 123 bytes.")):
        monkeypatch.setattr(DDPM, "sample", Mock(side_effect=error))
        said = sentence(capsys, monkeypatch, "sample --weights", weights["ddpm"], "--out", tmp_path / "x.png")
        assert "memory is full" in said


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_array_of_images_gets_one_sentence(place, capsys, monkeypatch, share):
    content = (place / "few.npz").read_bytes()
    (place / "few.npz").write_bytes(content[:int(share * len(content))])
    assert "few.npz cannot be used" in sentence(capsys, monkeypatch, "evaluate --dataset shapes --images few.npz")


def test_a_home_folder_is_meant_by_its_sign_in_options_and_variables(weights, tmp_path, monkeypatch):
    "No shell replaces it in --out=~/x.png, nor in a variable that is set by a program."
    home = tmp_path / "home"
    (home / "data" / "cifar10").mkdir(parents=True)
    for variable, value in (("HOME", home), ("HYBRIDVAE_DATA", "~/data"), ("HYBRIDVAE_RUNS", "~/runs"),
                            ("HYBRIDVAE_WEIGHTS", "~/weights")):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights["vae"].parent, home / "weights")
    command("sample --n 2 --cpu --weights ~/weights/vae.safetensors --out=~/x.png")
    command("interpolate --n 2 --cpu --weights vae --images ~/x.png ~/x.png --out ~/y.png")
    command("evaluate --n 6 --dataset shapes --cpu --weights=~/weights/vae.safetensors --json=~/m.json "
            "--features ~/weights/features.safetensors")
    assert {"x.png", "y.png", "m.json"} <= set(files_below(home)) and files_below(tmp_path)[0] == "home"
    assert (data.data_root(), weights_folder()) == (home / "data", home / "weights")
    assert record_roots()[-1] == home / "runs" and not (tmp_path / "~").exists()


LANGUAGES = {"ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
             "latin-1": {"PYTHONIOENCODING": "latin-1"}}


@pytest.mark.parametrize("environment", LANGUAGES.values(), ids=LANGUAGES)
def test_any_output_encoding_will_do(weights, photos, tmp_path, environment):
    "x̂ is no letter of ASCII or Latin-1."
    program = ("import sys\nfrom hybridvae.cli import main\n"
               "for words in sys.argv[1].split(';'):\n"
               "    sys.argv = ['hybridvae', *words.split()]\n"
               "    try: main()\n"
               "    except SystemExit as end: assert not end.code, words")
    lines = [*(f"{name} --help" for name in COMMANDS),
             f"reconstruct --cpu --steps 1 --n 1 --weights {weights['hybrid']} --images {photos} --out {photos}/x.png"]
    done = subprocess.run([sys.executable, "-c", program, ";".join(lines)], env={**os.environ, **environment},
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"1 images, in rows: image, x" in done.stdout and done.stdout.count(b"Usage:") == len(COMMANDS)


def without(path, out, *parts):
    "A weights file in which these parameters, and parts of them, are zero."
    model = load_model(path)
    for name, rows in parts:
        model.get_parameter(name).data[rows] = 0
    return save_model(model, out)


ALL, OF_X_HAT = slice(None), (slice(None), slice(48, 96))  # of the first layer's input: patches of x_t, then of x̂


def test_a_code_that_says_nothing_is_named_where_it_is_trained_given_and_followed(tiny, weights, tmp_path, monkeypatch):
    "σ = 10 makes reconstruction worthless against the KL."
    silent = "the code of this VAE says nothing about an image"
    monkeypatch.setitem(custom.PRESETS["shapes"], "vae", TINY_VAE | {"sigma": 10.0})
    line = "train --dataset shapes --model vae --kimg 0.32 --batch-size 16 --lr 0.01 --cpu --out"
    said = command(line, tmp_path / "v")
    assert silent in said and "lower sigma" in said
    words = "train --dataset shapes --kimg 0.032 --batch-size 16 --cpu --out"
    dead = tmp_path / "v" / "model.safetensors"
    assert silent in command(words, tmp_path / "h", "--vae", dead)
    assert silent not in command(words, tmp_path / "sound", "--vae scenes-diffusevae")
    one = without(weights["vae"], tmp_path / "one.safetensors", ("decoder.net.0.weight", ALL))
    for path in (one, weights["vae"]):
        said = command("interpolate --n 3 --cpu --weights", path, "--out", tmp_path / "i.png")
        assert ("x̂ is the same all along the path" in said) == (path == one)


def test_a_refiner_that_ignores_what_it_is_given_is_named(weights, tmp_path):
    images = data.load_data("shapes", "test").first(16).tensor()
    for zeroed, named in (([], []), ([("unet.stem.weight", OF_X_HAT)], ["x̂"]),
                          ([("unet.z_mlp.0.weight", ALL)], ["z"]),
                          ([("unet.stem.weight", OF_X_HAT), ("unet.z_mlp.0.weight", ALL)], ["x̂", "z", "guidance"])):
        path = without(weights["guided"], tmp_path / "m.safetensors", *zeroed)
        found = [text.split(" has no effect") for text in generators.dead_parts(load_model(path), images)]
        assert [name for name, *rest in found if rest] == named
        said = command("sample --cpu --n 1 --steps 1 --guidance-weight 3 --weights", path, "--out", tmp_path / "x.png")
        assert ("--guidance-weight has no effect" in said) == ("guidance" in named)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_sentence_and_nothing_half_written(weights, tmp_path, capsys, monkeypatch,
                                                                             number):
    monkeypatch.setattr(DDPM, "sample", lambda self, n, **options: signal.raise_signal(number))
    monkeypatch.setattr("sys.argv", words_of(("hybridvae sample --cpu --weights", weights["ddpm"], "--out",
                                              tmp_path / "x.png")))
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 128 + number and said.startswith(f"hybridvae: stopped by {number.name}: nothing is left")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False), (None, True)])
def test_of_several_processes_the_first_prints(rank, speaks, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["hybridvae", "run", "--dataset", "shapes"])  # lists the experiments
    with contextlib.suppress(SystemExit):
        main()
    assert ("diffusevae-form1" in capsys.readouterr().out) == speaks
    print("and after")
    assert capsys.readouterr().out == "and after\n"


def test_a_command_does_not_hear_a_signal_that_is_ignored(weights, tmp_path, monkeypatch):
    drawn = DDPM.sample
    monkeypatch.setattr(DDPM, "sample", lambda self, n, **options: (signal.raise_signal(signal.SIGINT),
                                                                    drawn(self, n, **options))[1])
    monkeypatch.setattr("sys.argv", words_of(("hybridvae sample --cpu --n 1 --steps 1 --weights", weights["ddpm"],
                                              "--out", tmp_path / "x.png")))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(SystemExit):  # typer ends so
            main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and (tmp_path / "x.png").exists()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_campaign_for_a_gpu_does_not_start_without_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in sentence(capsys, monkeypatch, "campaign --dataset cifar10")


def test_a_data_set_without_a_feature_network_says_so(place, capsys, monkeypatch):
    (place / "cache" / "flowers").mkdir()
    for split in ("train", "test"):
        shutil.copy(place / "cache" / "cifar10" / f"{split}_images.npy", place / "cache" / "flowers")
    assert "--features" in sentence(capsys, monkeypatch, "evaluate --dataset flowers --weights vae.safetensors")
    assert "n = 10" in command("evaluate --cpu --dataset flowers --n 10 --weights vae.safetensors --features shapes")


def test_a_training_folder_is_not_used_for_another_training(tiny, cache, tmp_path, capsys, monkeypatch):
    words = "--model vae --cpu --out", tmp_path / "run"
    command("train --dataset shapes", *words)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for line, says in (("cifar10", "on other images"), ("shapes --lr 0.5", "with another config or seed"),
                       ("shapes --seed 1", "with another config or seed")):
        assert f"holds a run {says}" in sentence(capsys, monkeypatch, f"train --dataset {line}", *words)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_damaged_cache_gets_one_sentence(cache, capsys, monkeypatch):
    path = cache / "cifar10" / "train_images.npy"
    path.write_bytes(path.read_bytes()[:1000])
    assert "train_images.npy" in sentence(capsys, monkeypatch, "data cifar10")


def test_what_a_model_says_of_a_bad_option_is_the_sentence(weights, tmp_path, capsys, monkeypatch):
    def sample(self, n, **options):
        raise ValueError("colour is 'plaid': choose red or blue")

    monkeypatch.setattr(DDPM, "sample", sample)
    said = sentence(capsys, monkeypatch, "sample --weights", weights["ddpm"], "--out", tmp_path / "x.png")
    assert "colour is 'plaid': choose red or blue." in said
    assert files_below(tmp_path) == []


def test_a_full_gpu_gets_one_sentence(weights, tmp_path, capsys, monkeypatch):
    def sample(self, n, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(DDPM, "sample", sample)
    assert "--batch" in sentence(capsys, monkeypatch, "sample --weights", weights["ddpm"], "--out", tmp_path / "x.png")


def test_a_bug_is_not_dressed_up_as_a_mistake(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(DDPM, "sample", lambda self, n, **options: 1 / 0)
    words = "hybridvae sample --weights", weights["ddpm"], "--out", tmp_path / "x.png"
    monkeypatch.setattr("sys.argv", words_of(words))
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_stopped_write_leaves_what_was_there(weights, tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_bytes(b"from before")
    monkeypatch.setattr(np, "savez", disk_full)
    words = "sample --cpu --n 2 --weights", weights["vae"], "--out", tmp_path / "x.npz"
    answer = CliRunner().invoke(app, words_of(words))
    assert isinstance(answer.exception, HybridVAEError) and "No space" in str(answer.exception)
    assert files_below(tmp_path) == ["x.npz"] and (tmp_path / "x.npz").read_bytes() == b"from before"
