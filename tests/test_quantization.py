"""Quantisation: rounding against plain formulas, calibration, models in int8 on disk and in the command line."""
import copy
import functools
import json

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae import data
from hybridvae import quantization as quant
from hybridvae.adaptive import AdaptiveDiffuseVAE
from hybridvae.cli import app
from hybridvae.core import image_draws, int8_weight, load_model, save_model, to_uint8
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.joint import JointDiffuseVAE
from hybridvae.latent import LatentDiffuseVAE, LatentDiffusion
from hybridvae.metrics import describe, frechet_distance
from hybridvae.quantization import (FLOAT_PARTS, INT8_CLASSES, Int8Conv, Int8Linear, activation_ranges, byte_range,
                                    bytes_by_type, has_int8_kernels, int8_state, int8_variants, quantizable,
                                    quantize, to_bytes)
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

VAE_SIZES = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
PLACES = dict(image_size=16, z_channels=2, width=8, multipliers=(1, 2), patch=2)  # codes of 2 x 4 x 4
UNET = dict(image_size=16, width=16, multipliers=(1, 2), attention=(8,))
SMALL, MLP = {"width": 8, "multipliers": [1, 2], "attention": [4]}, {"width": 8, "blocks": 1}
kernels = pytest.mark.skipif(not has_int8_kernels("cpu"), reason="this processor has no kernels for int8")

MODELS = {
    "ddpm": lambda: DDPM(UNET),
    "form 1": lambda: DiffuseVAE(VAE_SIZES, UNET),
    "form 2, z": lambda: DiffuseVAE(VAE_SIZES, UNET, form=2, z_guidance=True),
    "joint": lambda: JointDiffuseVAE(VAE_SIZES, UNET),
    "adaptive": lambda: AdaptiveDiffuseVAE(VAE_SIZES, UNET),
    "latent": lambda: LatentDiffusion(PLACES, SMALL),
    "latent hybrid": lambda: LatentDiffuseVAE(VAE_SIZES, UNET, denoiser=MLP),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    "A model with random weights, and its twin in int8."
    model = randomised(MODELS[request.param](), scale=0.1).eval()
    return model, quantize(model, n=4, steps=4)


@pytest.fixture(scope="module")
def ddpm():
    return randomised(DDPM(UNET), scale=0.1).eval()


def drawn(model, seed=3, **options):
    return model.sample(4, steps=4, generator=image_draws(seed, 0, 4), **options)


# --- numbers --------------------------------------------------------------------------------------------------------

def test_each_channel_uses_all_of_its_bytes():
    w = torch.randn(5, 4, 3, 3, generator=generator()) * torch.tensor([1e-4, 0.1, 1, 10, 0])[:, None, None, None]
    q, scale = int8_weight(w)
    assert q.dtype == torch.int8 and q.flatten(1).abs().amax(dim=1).tolist() == [127, 127, 127, 127, 0]
    assert ((q * scale[:, None, None, None] - w).abs() <= scale[:, None, None, None] * 0.501).all()


@pytest.mark.parametrize("low, high", [(-0.3, 8.0), (0.5, 2.0), (-5.0, -1.0), (0.0, 0.0), (-1e3, 1e3)])
def test_bytes_cover_a_range_and_hold_zero_exactly(low, high):
    scale, zero = byte_range(low, high)
    x = torch.cat([torch.linspace(low, high, 1_001), torch.zeros(1)])
    back = scale * (to_bytes(x, scale, zero).double() - zero)
    assert 0 <= zero <= 255 and back[-1] == 0
    assert (back - x).abs().max() <= 0.51 * scale + 1e-9
    if high > low:
        assert to_bytes(torch.tensor([high + 9e3, low - 9e3]), scale, zero).tolist() == [255, 0]


LAYERS = {"3x3": nn.Conv2d(8, 16, 3, padding=1), "down": nn.Conv2d(8, 8, 3, stride=2, padding=1),
          "1x1": nn.Conv2d(8, 24, 1), "linear": nn.Linear(8, 12)}


def made(layer, x):
    "The layer in int8 that takes inputs x."
    twin = Int8Conv(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer)
    twin.load_state_dict(int8_state(layer, *byte_range(x.min().item(), x.max().item())))
    return twin


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_the_integer_sum_scaled(name, monkeypatch):
    "In the kernels, and where there are none; written plainly in float64."
    layer = randomised(LAYERS[name], scale=0.2)
    x = F.silu(torch.randn(3, 8, 9, 9, generator=generator()) * 3 + 1)
    x = x if name != "linear" else x[:, :, 0, 0]
    twin, (scale, zero) = made(layer, x), byte_range(x.min().item(), x.max().item())
    q, channel_scale = int8_weight(layer.weight)
    exact = copy.deepcopy(layer).double()
    exact.weight.copy_(q.double() * channel_scale.double().reshape(-1, *[1] * (q.ndim - 1)))
    expected = exact(scale * (to_bytes(x, scale, zero).double() - zero))
    torch.testing.assert_close(twin(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert 0 < (twin(x) - layer(x)).norm() / layer(x).norm() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        half = twin(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.01, atol=0.02)
    monkeypatch.setattr(quant, "has_int8_kernels", lambda device: False)
    torch.testing.assert_close(made(layer, x)(x).double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_layer_is_a_layer_of_its_own():
    x = torch.randn(2, 8, 6, 6, generator=generator())
    layer = made(randomised(nn.Conv2d(8, 8, 3, padding=1), scale=0.2), x)
    twin, before = copy.deepcopy(layer), layer(x)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
    twin.load_state_dict({**twin.state_dict(), "bias": twin.bias + 1})
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), before + 1)
    number = layer.number
    del layer
    torch.testing.assert_close(twin(x), before + 1)
    assert twin.number != number


# --- calibration ----------------------------------------------------------------------------------------------------

def test_ranges_are_those_of_the_inputs_along_the_trajectory(ddpm):
    ranges, seen = activation_ranges(ddpm, n=3, steps=5, seed=2), []
    layer = ddpm.unet.get_submodule("down.0.0.conv1")
    with layer.register_forward_pre_hook(lambda _, x: seen.append((x[0].min().item(), x[0].max().item()))):
        ddpm.sample(3, steps=5, generator=image_draws(2, 0, 3))
    grid = ddpm.diffusion.timestep_grid(5)[:-1]
    assert ranges.keys() == quantizable(ddpm).keys() and ranges["unet.down.0.0.conv1"].keys() == {*grid}
    for (low, high), t in zip(seen, grid):
        assert ranges["unet.down.0.0.conv1"][t] == pytest.approx((min(low, 0), max(high, 0)))
    assert not any(m._forward_pre_hooks for m in ddpm.modules())


def test_what_stays_in_float(ddpm):
    names = quantizable(ddpm)
    layers = {n for n, m in ddpm.unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {n.removeprefix("unet.") for n in names} == {n for n in layers if n.split(".")[0] not in FLOAT_PARTS}
    assert len(names) > 15 and "unet.down.0.0.conv1" in names and "unet.stem" not in names


@torch.no_grad()
def test_parts_that_are_kept_stay_in_float_also_in_a_file(ddpm, tmp_path):
    ranges = activation_ranges(ddpm, n=2, steps=3)
    last = [name for name in quantizable(ddpm) if name.startswith("unet.up.1.")]
    twin = quantize(ddpm, ranges, keep=("up.1",))
    back = load_model(save_model(twin, tmp_path / "kept.safetensors"))
    assert last and quantizable(ddpm, ("up.1",)).keys() == quantizable(ddpm).keys() - set(last)
    for name in last:
        assert torch.equal(twin.get_submodule(name).weight, ddpm.get_submodule(name).weight)
        assert type(back.get_submodule(name)) is type(ddpm.get_submodule(name))
    assert back.config == twin.config and back.config["keep"] == ["up.1"]
    assert "keep" not in quantize(ddpm, ranges).config
    x, t = torch.randn(4, 3, 16, 16, generator=generator()), torch.full((4,), 500)
    change = lambda other: (other.unet(x, t) - ddpm.unet(x, t)).square().mean().item()
    everything = [name.removeprefix("unet.") for name in quantizable(ddpm)]
    assert 0 < change(quantize(ddpm, ranges, keep=everything[1:])) < change(twin)
    with complains("nothing is left"):
        quantize(ddpm, ranges, keep=everything)
    with complains("no part 'up.9'", "middle.0", "up.1"):
        quantize(ddpm, ranges, keep=("up.1", "up.9"))


@torch.no_grad()
def test_ranges_of_one_timestep_clip_the_others(ddpm):
    "The same U-Net calls, with ranges over all timesteps and of the last one only, where inputs were made small."
    ranges = activation_ranges(ddpm, n=4, steps=4)
    last = min(next(iter(ranges.values())))
    narrow = {name: {last: tuple(0.25 * end for end in at[last])} for name, at in ranges.items()}
    x, t = torch.randn(4, 3, 16, 16, generator=generator()), torch.full((4,), 999)
    exact = ddpm.unet(x, t)
    error = lambda r: ((quantize(ddpm, r).unet(x, t) - exact).norm() / exact.norm()).item()
    assert error(ranges) < 0.1 and error(narrow) > 3 * error(ranges)


def test_the_variants_differ_only_in_their_ranges(ddpm):
    ranges = activation_ranges(ddpm, n=2, steps=3)
    variants = int8_variants(ddpm, ranges)
    grid = ddpm.diffusion.timestep_grid(3)[:-1]
    name = "unet.middle.0.0.conv2"
    for key, t in (("first", grid[0]), ("middle", grid[1]), ("last", grid[2])):
        layer = variants[f"int8, {key} timestep"].get_submodule(name)
        assert (layer.scale, layer.zero) == pytest.approx(byte_range(*ranges[name][t]))
        assert torch.equal(layer.weight, variants["int8"].get_submodule(name).weight)
    low, high = zip(*ranges[name].values())
    assert variants["int8"].get_submodule(name).scale == pytest.approx(byte_range(min(low), max(high))[0])
    assert type(variants["int4 storage"]) is DDPM


# --- models ---------------------------------------------------------------------------------------------------------

def test_samples_in_int8_are_those_in_float_but_for_rounding(pair):
    model, twin = pair
    assert isinstance(twin, type(model)) and twin.config["model"] == type(twin).__name__ and not twin.training
    a, b = drawn(model), drawn(twin)
    assert 0 < (a - b).square().mean().sqrt() < 0.1 and a.std() > 0.05


def test_a_model_in_int8_is_bytes_on_disk_and_comes_back(pair, tmp_path):
    model, twin = pair
    path = save_model(twin, tmp_path / "int8.safetensors", torch.int8)
    stored, back = load_file(path), load_model(path)
    assert type(back) is type(twin) and back.config == twin.config
    for name, layer in quantizable(model).items():
        assert stored[f"{name}.weight"].dtype == torch.int8 and stored[f"{name}.weight"].shape == layer.weight.shape
        assert torch.equal(back.get_submodule(name).weight, twin.get_submodule(name).weight)
    assert not [n for n, t in stored.items() if t.is_floating_point() and t.ndim in (2, 4)]  # no float original is kept
    torch.testing.assert_close(drawn(load_model(save_model(twin, tmp_path / "exact.safetensors"))), drawn(twin))
    torch.testing.assert_close(drawn(back), drawn(twin), rtol=0, atol=0.2)


def test_the_file_is_a_quarter(tmp_path):
    "Of a U-Net that is not tiny; bytes by type add up to the tensors of the file."
    model = randomised(DDPM(UNET | {"width": 64}), scale=0.05).eval()
    path = save_model(quantize(model, n=1, steps=1), tmp_path / "int8.safetensors", torch.int8)
    sizes = bytes_by_type(path)
    assert sum(sizes.values()) == sum(t.nbytes for t in load_file(path).values())
    assert list(sizes)[0] == "int8" and sizes["int8"] > 0.95 * sum(sizes.values())
    assert save_model(model, tmp_path / "fp32.safetensors").stat().st_size > 3.7 * path.stat().st_size


@kernels
@torch.no_grad()
def test_every_quantised_layer_runs_in_a_kernel_for_int8(ddpm):
    twin = quantize(ddpm, n=1, steps=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        twin.unet(torch.randn(2, 3, 16, 16), torch.zeros(2))
    calls = {event.key: event.count for event in profiler.key_averages()}
    of = lambda kind: sum(isinstance(layer, kind) for layer in twin.modules())
    assert calls["onednn::qconv_pointwise"] == of(Int8Conv) > 10
    assert calls["onednn::qlinear_pointwise"] == of(Int8Linear) > 5
    assert calls["aten::convolution"] == 2  # stem and head


def test_a_model_in_int8_is_not_trained_and_not_quantised_again(ddpm):
    twin = quantize(ddpm, n=1, steps=1)
    with complains("cannot be trained", "float model"):
        twin.training_loss(torch.zeros(1, 3, 16, 16))
    with complains("a Int8DDPM cannot be quantised", "DiffuseVAE"):
        quantize(twin)
    with complains("a VAE cannot be quantised"):
        quantize(VAE(**VAE_SIZES))
    with complains("has no U-Net"):
        quantize(LatentDiffusion(VAE_SIZES, MLP))
    assert INT8_CLASSES.keys() == {type(build()).__name__ for build in MODELS.values()}


# --- the command line -----------------------------------------------------------------------------------------------

def test_the_command_makes_weights_that_other_commands_take(tmp_path, ddpm):
    run = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    save_model(ddpm, tmp_path / "ddpm.safetensors")
    said = run("quantize", "--weights", tmp_path / "ddpm.safetensors", "--n", 2, "--steps", 3,
               "--out", tmp_path / "small.safetensors")
    assert said.exit_code == 0 and "Int8DDPM" in said.output and "MB in float" in said.output
    expected = quantize(ddpm, n=2, steps=3)
    back = load_model(tmp_path / "small.safetensors")
    assert {n: m.scale for n, m in back.named_modules() if isinstance(m, quant.Int8Layer)} == pytest.approx(
        {n: m.scale for n, m in expected.named_modules() if isinstance(m, quant.Int8Layer)})
    done = run("sample", "--cpu", "--precision", "fp32", "--n", 3, "--steps", 2, "--weights",
               tmp_path / "small.safetensors", "--out", tmp_path / "x.npz")
    assert done.exit_code == 0, done.output
    images = to_uint8(back.to(memory_format=torch.channels_last).sample(3, steps=2, generator=image_draws(0, 0, 3)))
    assert np.abs(np.load(tmp_path / "x.npz")["arr_0"].transpose(0, 3, 1, 2).astype(int) - images.numpy()).max() <= 1
    wrong = run("quantize", "--weights", tmp_path / "ddpm.safetensors", "--out", tmp_path / "x.bin")
    assert wrong.exit_code != 0


class Pixels(nn.Module):
    "A feature network of six numbers: means of colours and their squares."

    name, num_features = "pixels", 6

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        means = x.float().mean(dim=(2, 3)) / 255
        return torch.cat([means, means.square()], dim=1) * self.one


def test_the_interval_of_a_change_is_of_pairs_and_holds_the_change():
    level = lambda n, seed: torch.rand(n, 3, 1, 1, generator=generator(seed)) * 200  # of grey images, which differ
    images = (level(200, 1) ** 2 / 200 + 20 * torch.rand(200, 3, 16, 16, generator=generator(3))).to(torch.uint8)
    real = describe(Pixels(), (level(300, 2) + 20 * torch.rand(300, 3, 16, 16, generator=generator(4))).to(torch.uint8))
    before, after = describe(Pixels(), images), describe(Pixels(), (images * 0.95).to(torch.uint8))
    assert quant.changes(before, before, real, draws=10) == {"FD (pixels)": (0, 0), "texture distance": (0, 0)}
    low, high = quant.changes(before, after, real, draws=60)["FD (pixels)"]
    change = frechet_distance(after.features, real.features) / frechet_distance(before.features, real.features) - 1
    assert 0 < low < change < high
    apart = describe(Pixels(), (images * 0.95).to(torch.uint8).flip(0))  # other pairs: nothing cancels
    wide = quant.changes(before, apart, real, draws=60)["FD (pixels)"]
    assert wide[1] - wide[0] > 1.5 * (high - low)


def test_the_command_measures_every_variant_beside_what_the_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(quant, "distances_after", functools.partial(quant.distances_after, n=8, batch=4, draws=5))
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
    run = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    model = randomised(DDPM(UNET | {"image_size": 32, "attention": (16,)}), scale=0.1)
    save_model(model, tmp_path / "ddpm.safetensors")
    file = tmp_path / "distances.json"
    file.write_text('{"others": 1}')
    words = ("quantize", "--weights", tmp_path / "ddpm.safetensors", "--n", 2, "--out", tmp_path / "small.safetensors")
    said = run(*words, "--dataset", "shapes", "--json", file)
    assert said.exit_code == 0, said.output
    found = json.loads(file.read_text())
    rows = found.pop(str(tmp_path / "ddpm.safetensors"))["rows"]
    assert found == {"others": 1} and [r["variant"] for r in rows][:3] == ["fp32", "bf16", "int8"] and len(rows) == 7
    assert rows[0]["changes"] == {} and rows[2]["changes"].keys() == {"FD (shapes)", "texture distance"}
    assert rows[0]["rms_levels"] == 0 < rows[2]["rms_levels"] and all("texture distance" in r["metrics"] for r in rows)
    assert run(*words, "--json", file).exit_code != 0  # of which data?
    few = run(*words, "--dataset", "shapes", "--json", file, "--variant", "int8")
    assert few.exit_code == 0, few.output
    assert [r["variant"] for r in json.loads(file.read_text())[str(words[2])]["rows"]] == ["fp32", "int8"]
    kept = run(*words, "--dataset", "shapes", "--json", file, "--variant", "int8", "--keep", "middle.0")
    assert kept.exit_code == 0, kept.output
    both = json.loads(file.read_text())
    one, other = (both[str(words[2]) + beside]["rows"] for beside in ("", ", middle.0 in float"))
    assert one[0]["metrics"] == other[0]["metrics"] and one[1]["rms_levels"] != other[1]["rms_levels"]


@pytest.mark.parametrize("words, sentence", [
    (("--variant", "int8"), "give --dataset"),
    (("--dataset", "shapes", "--json", "m.json", "--variant", "int7"), "'int7'")])
def test_a_variant_that_cannot_be_measured_is_refused_before_any_work(tmp_path, words, sentence):
    save_model(DDPM(UNET), tmp_path / "ddpm.safetensors")
    said = CliRunner().invoke(app, ["quantize", "--weights", str(tmp_path / "ddpm.safetensors"), *words,
                                    "--out", str(tmp_path / "small.safetensors")])
    assert said.exit_code != 0 and sentence in str(said.exception) + said.output
    assert not (tmp_path / "small.safetensors").exists()
