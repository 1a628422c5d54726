"""Precision, compilation and the environment: one place decides each, and says what it decided.

The first part runs everything in bfloat16, also on machines that are not fast at it: there nothing else would.
"""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import complains, randomised
from hybridvae import cli, data, runs, training
from hybridvae.core import Model, image_draws, load_model, save_model, to_uint8, weights_hash
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.features import load_features
from hybridvae.metrics import describe
from hybridvae.entries import Entry
from hybridvae.runs import evaluate, run_entry
from hybridvae.training import (COMPILE_FROM, TrainConfig, autocast, choose_compile, choose_precision, supports_bf16,
                                train,
                                training_flops)
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from typer.testing import CliRunner

CPU = torch.device("cpu")
TINY_VAE = {"image_size": 32, "z_dim": 4, "width": 8, "multipliers": [1, 2], "patch": 4}
TINY_UNET = {"image_size": 32, "width": 16, "multipliers": [1, 2], "attention": [4], "patch": 4}


def command(*words):
    answer = CliRunner().invoke(cli.app, [str(w) for w in words])
    assert answer.exit_code == 0, answer.output + repr(answer.exception)
    return answer.output


def few(n=24, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors), factors)


def small(seed=0):
    torch.manual_seed(seed)
    return DDPM(TINY_UNET)


def smallest():
    torch.manual_seed(0)
    return VAE(image_size=32, z_dim=4, width=8, multipliers=[1], patch=8)


def trained(folder, config=None, model=None, **options):
    model = model or small()
    result = train(model, few(), config or TrainConfig(kimg=0.064, batch_size=8), folder,
                   **{"cpu": True, "progress": False, **options})
    return model, result


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "bf16")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(randomised(DiffuseVAE(TINY_VAE, TINY_UNET), 0.1),
                      tmp_path_factory.mktemp("weights") / "hybrid.safetensors")


# --- everything in bfloat16 -----------------------------------------------------------------------------------------

def test_samples_in_bf16_say_so_are_close_and_are_the_same_in_any_batch(bf16, hybrid, tmp_path):
    line = ("sample", "--cpu", "--steps", 3, "--weights", hybrid, "--out")
    assert "computing in bf16" in command(*line, tmp_path / "all.npz", "--n", 6)
    command(*line, tmp_path / "parts.npz", "--n", 6, "--batch", 2)
    assert "computing in fp32" in command(*line, tmp_path / "full.npz", "--n", 6, "--precision", "fp32")
    whole, parts, full = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("all", "parts", "full"))
    assert (
        np.abs(whole - parts).mean() < 0.5 and np.abs(whole - parts).max() <= 16
    )  # rounding may differ with the batch
    assert 0 < np.abs(whole - full).mean() < 4


def test_training_in_bf16_continues_bit_for_bit_and_is_recorded(bf16, tmp_path):
    whole, result = trained(tmp_path / "whole")
    assert (result.precision, [p["precision"] for p in result.parts]) == ("bf16", ["bf16"])
    trained(tmp_path / "halves", minutes=0)
    halves, result = trained(tmp_path / "halves")
    assert same(whole, halves) and [p["from_step"] for p in result.parts] == [0, 1]
    assert all(p.dtype == torch.float32 for p in whole.parameters())
    full, result = trained(tmp_path / "full", TrainConfig(kimg=0.064, batch_size=8, precision="fp32"))
    assert result.precision == "fp32" and not same(whole, full)  # what the config says counts first


def test_a_run_continued_in_another_precision_says_both(bf16, tmp_path, monkeypatch):
    trained(tmp_path, minutes=0)
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "fp32")
    assert trained(tmp_path)[1].precision == "bf16+fp32"


def test_an_entry_in_bf16_is_evaluated_in_bf16_and_measured_in_full_precision(bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
    dtypes, network = set(), load_features("shapes")
    forward = type(network).forward
    monkeypatch.setattr(type(network), "forward", lambda self, x: dtypes.add(forward(self, x).dtype)
                        or forward(self, x))
    entry = Entry("vae", "shapes", {"model": "VAE", **TINY_VAE}, {"kimg": 0.016, "batch_size": 8}, features="features",
                  batch=12,
                  evaluations=({"sampler": None, "steps": 1, "n": 20},
                               {"sampler": None, "steps": 1, "n": 20, "prior": "ex-pde"}))
    eye = Entry("features", "shapes", {"model": "FeatureNetwork", "name": "shapes", "classes": 3, "factors": True},
                {"kimg": 0.016})
    record = run_entry(entry, [entry, eye], tmp_path, cpu=True, progress=False)
    assert record["precision"] == record["measured_precision"] == record["evaluations"][0]["precision"] == "bf16"
    assert {e["drawn"] for e in record["evaluations"]} == {"by image"} and dtypes == {torch.float32}
    assert all(np.isfinite(m["value"]) for e in record["evaluations"] for m in e["metrics"].values())


def test_every_command_that_computes_takes_a_precision_and_leaves_the_environment_as_it_was(
    bf16, hybrid, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
    for words in (["reconstruct", "--dataset", "shapes", "--out", tmp_path / "r.png"],
                  ["interpolate", "--out", tmp_path / "i.png"],
                  ["evaluate", "--dataset", "shapes", "--n", 20]):
        said = command(*words, "--weights", hybrid, "--steps", 2, "--cpu", "--precision", "fp32")
        assert "computing in fp32" in said and training.os.environ["HYBRIDVAE_PRECISION"] == "bf16"
    commands = cli.typer.main.get_command(cli.app).commands
    # data and rate compute nothing, export fits its prior in full precision, quantize calibrates in it
    without = {"data", "export", "quantize", "rate"}
    assert all(any("--precision" in p.opts for p in c.params) for name, c in commands.items() if name not in without)


# --- who decides ----------------------------------------------------------------------------------------------------

def test_the_config_decides_then_the_environment_then_the_hardware(monkeypatch):
    monkeypatch.delenv("HYBRIDVAE_PRECISION", raising=False)
    for fast in (True, False):
        monkeypatch.setattr(training, "supports_bf16", lambda device, fast=fast: fast)
        assert choose_precision(CPU) == ("bf16" if fast else "fp32")
        assert [choose_precision(CPU, p) for p in ("bf16", "fp32")] == ["bf16", "fp32"]
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "bf16")
    assert [choose_precision(CPU, p) for p in ("auto", "bf16", "fp32")] == ["bf16", "bf16", "fp32"]
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "half")
    with complains("HYBRIDVAE_PRECISION is 'half'", "bf16"):
        choose_precision(CPU)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_a_cpu_is_fast_at_bf16_only_with_instructions_for_it(monkeypatch, tiles, products):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: products, raising=False)
    assert supports_bf16(CPU) is (tiles or products)


def in_a_new_process(folder, **environment):
    "Weights and precision of a training with this environment, and what is left of it; Accelerate keeps its settings."
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from test_precision import *; import os\n"
            "model, result = trained(sys.argv[2], TrainConfig(kimg=0.064, batch_size=8, precision='fp32'))\n"
            "print(weights_hash(model), result.precision, *[os.environ.get(name) for name in sys.argv[3:]])")
    env = {k: v for k, v in training.os.environ.items() if not k.startswith("ACCELERATE_")}
    words = [sys.executable, "-c", code, str(training.Path(__file__).parent), str(folder), *environment]
    return subprocess.run(words, env=env | environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return in_a_new_process(tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize("variable, value", [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
                                             ("ACCELERATE_MIXED_PRECISION", "bf16"),
                                             ("ACCELERATE_DYNAMO_BACKEND", "EAGER"), ("ACCELERATE_USE_FSDP", "true")])
def test_accelerates_environment_changes_nothing(variable, value, plain, tmp_path):
    "The same config gives the same weights, and the variable is there again afterwards."
    assert in_a_new_process(tmp_path / "other", **{variable: value}) == [*plain, value]


# --- compilation ----------------------------------------------------------------------------------------------------

def test_long_work_is_compiled_short_work_is_not_and_a_switch_decides_otherwise(monkeypatch):
    monkeypatch.setattr(training, "compiler_works", lambda kind: True)
    monkeypatch.delenv("HYBRIDVAE_COMPILE", raising=False)
    for kind in ("cpu", "cuda"):
        device, enough = torch.device(kind), COMPILE_FROM[kind]
        assert choose_compile(device, enough) and not choose_compile(device, 0.99 * enough)
    monkeypatch.setenv("HYBRIDVAE_COMPILE", "off")
    assert not choose_compile(CPU, 1e20) and not choose_compile(torch.device("cuda"), 1e20)
    monkeypatch.setenv("HYBRIDVAE_COMPILE", "on")
    assert choose_compile(CPU, 1.0)
    monkeypatch.setattr(training, "compiler_works", lambda kind: False)
    assert not choose_compile(CPU, 1e20)
    monkeypatch.setenv("HYBRIDVAE_COMPILE", "yes")
    with complains("HYBRIDVAE_COMPILE is 'yes'", "off"):
        choose_compile(CPU, 1.0)


def test_operations_of_training_are_those_of_three_forward_passes(monkeypatch):
    monkeypatch.setitem(COMPILE_FROM, "cpu", 0.0)  # small numbers are counted, too
    model = small().train()
    once = training_flops(model, few(), 1)
    assert model.training and once == 3 * training.count_flops(lambda: model.unet(torch.zeros(1, 3, 32, 32),
                                                                                  torch.zeros(1))) > 0
    assert training_flops(model, few(), 500) == 500 * once
    monkeypatch.undo()
    assert training_flops(small(), few(), 1) >= once  # a bound from above, where it does not matter


def test_without_a_compiler_there_is_one_sentence_and_the_run_goes_on(tmp_path):
    "In a process that finds no compiler, and keeps nothing that was compiled before."
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_precision import *; import torch._inductor.config as config\n"
        "config.cpp.cxx = ('no-such-compiler',)\n"
        "model, result = trained(sys.argv[2])\n"
        "train(small(), few(), TrainConfig(kimg=0.016, batch_size=8), sys.argv[2] + '2', cpu=True, progress=False)\n"
        "print(result.finished, result.compiled)"
    )
    env = {**training.os.environ, "HYBRIDVAE_COMPILE": "on", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, str(training.Path(__file__).parent), str(tmp_path / "run")],
                          env=env,
                          capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["True", "False"], done.stderr
    said = [line for line in done.stderr.splitlines() if "compiler" in line and "Networks are not compiled" in line]
    assert len(said) == 1 and "g++" in said[0] and "Traceback" not in done.stderr


needs_compiler = pytest.mark.skipif(not any(map(training.shutil.which, ("c++", "g++", "cl"))),
                                    reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.03)])
def test_a_compiled_run_has_the_losses_of_an_eager_one_and_continues_bit_for_bit(precision, tolerance, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_PRECISION", precision)
    monkeypatch.setenv("HYBRIDVAE_COMPILE", "on")
    run = lambda name, **options: trained(tmp_path / name, model=smallest(), **options)  # which compiles in seconds
    compiled, result = run("compiled")
    assert result.compiled and result.parts[0]["compiled"]
    run("halves", minutes=0)
    assert same(compiled, run("halves")[0])
    monkeypatch.setenv("HYBRIDVAE_COMPILE", "off")
    eager, plain = run("eager")
    assert not plain.compiled
    for a, b in zip(result.history, plain.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    with torch.no_grad():
        a, b = (m.sample(2, generator=image_draws(0, 0, 2)) for m in (compiled, eager))
    assert (a - b).abs().max() < 100 * tolerance


# --- numbers that are none ------------------------------------------------------------------------------------------

@pytest.fixture
def damaged(tmp_path):
    model = DiffuseVAE(TINY_VAE, TINY_UNET)
    model.unet.head[-1].bias.data[0] = float("nan")
    return save_model(model, tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("words", ["sample --n 4 --out {}/x.png", "sample --n 4 --out {}/x.npz",
                                   "sample --n 4 --out {}/x",
                                   "reconstruct --dataset shapes --out {}/x.png", "interpolate --out {}/x.png",
                                   "evaluate --dataset shapes --n 20 --json {}/x.json"])
def test_damaged_weights_get_a_sentence_and_no_file(words, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
    words = words.format(tmp_path / "out").split()
    answer = CliRunner().invoke(cli.app, [*words, "--cpu", "--weights", str(damaged)])
    assert answer.exit_code != 0 and not (tmp_path / "out").exists()
    assert "not finite" in str(answer.exception) and str(damaged) in str(answer.exception)


def test_images_that_are_not_finite_are_refused_wherever_they_come_from():
    x = torch.zeros(2, 3, 4, 4)
    x[1, 0, 0, 0] = float("inf")
    with complains("not finite"):
        to_uint8(x)

    class Overflows(Model):
        def __init__(self):
            super().__init__()
            self.config, self.image_shape, self.weight = (
                {"model": "Overflows"},
                (3, 32, 32),
                torch.nn.Parameter(torch.ones(1)),
            )

        def sample(self, n, **options):
            return torch.full((n, 3, 32, 32), float("nan"))
    network = load_features("shapes")
    with complains("not finite"):
        evaluate(Overflows(), [network], [{"held-out": describe(network, few().tensor())}],
                 {"sampler": None, "steps": 1, "n": 8},
                 batch=8, progress=False)


# --- data is known by its content -------------------------------------------------------------------------------------

def test_a_fingerprint_is_of_the_content_alone():
    a, b = few(), few()
    assert a.fingerprint == b.fingerprint and re.fullmatch("[0-9a-f]{12}", a.fingerprint)
    b.images = b.images.copy()
    b.images[-1, -1, -1, -1] ^= 1
    labels = ImageData("shapes", "train", a.images, a.labels + 1)
    prints = {d.fingerprint for d in (a, ImageData("shapes", "train", b.images, b.labels), labels, few(23))}
    assert len(prints) == 4
    assert ImageData("other", "test", a.images, a.labels, description="other words").fingerprint == a.fingerprint


def test_large_data_is_read_in_part_and_a_memory_map_counts_as_its_content(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", few().images)
    mapped = ImageData("shapes", "train", np.load(tmp_path / "images.npy", mmap_mode="r"), few().labels)
    assert mapped.fingerprint == few().fingerprint


def test_training_does_not_go_on_with_other_images(tmp_path):
    trained(tmp_path, minutes=0)
    other = few(start=1)  # as many, of the same name
    with complains(str(tmp_path), "other images"):
        train(small(), other, TrainConfig(kimg=0.064, batch_size=8), tmp_path, cpu=True, progress=False)
    assert trained(tmp_path)[1].finished


def prepared(cache, seed):
    folder = cache / "flowers"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        np.save(folder / f"{split}_images.npy", np.random.default_rng(seed).integers(0, 256, (60, 32, 32, 3), np.uint8))


def test_the_command_line_refuses_other_images_under_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "cache"))
    prepared(tmp_path / "cache", 0)
    words = ["train", "--dataset", "flowers", "--model", "vae", "--small", "--kimg", "0.064", "--batch-size", "32",
             "--cpu", "--out", tmp_path / "run"]
    assert "the same command continues" in command(*words, "--minutes", 0)
    prepared(tmp_path / "cache", 1)
    answer = CliRunner().invoke(cli.app, list(map(str, words)))
    assert "holds a run on other images" in str(answer.exception)
    prepared(tmp_path / "cache", 0)
    assert "weights:" in command(*words)


def test_an_entry_trained_on_other_images_is_not_taken_for_this_one(tmp_path, monkeypatch):
    sizes = {"train": 60, "test": 40}
    monkeypatch.setattr(data, "SHAPES_SIZES", sizes)
    entry = Entry("vae", "shapes", {"model": "VAE", **TINY_VAE}, {"kimg": 0.016, "batch_size": 8})
    record = run_entry(entry, [entry], tmp_path, cpu=True, progress=False)
    assert record["data_hash"] == data.load_data("shapes").fingerprint
    (tmp_path / "shapes" / "vae" / "seed0.json").unlink()  # to be measured again, from the weights
    sizes["train"] = 50
    runs._forget()
    with complains("other images"):
        run_entry(entry, [entry], tmp_path, cpu=True, progress=False)


def test_a_finished_training_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "cache"))
    prepared(tmp_path / "cache", 0)
    words = ["train", "--dataset", "flowers", "--model", "ddpm", "--small", "--kimg", "0.064", "--batch-size", "32",
             "--cpu", "--out", tmp_path / "run"]
    command(*words)
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").glob("*.*")}
    monkeypatch.setattr("hybridvae.core.device_name", lambda device: "another machine")
    monkeypatch.setattr(training, "peak_memory", lambda device: 1)
    assert "weights:" in command(*words)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").glob("*.*")} == files
    note = json.loads((tmp_path / "run" / "training.json").read_text())
    assert note["weights_hash"] == weights_hash(load_model(tmp_path / "run" / "model.safetensors"))
    model, result = trained(tmp_path / "direct")
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "bf16")
    again = trained(tmp_path / "direct")[1]  # the function, too: nothing is computed, so nothing else is said
    assert (again.peak_memory_bytes, again.parts, again.seconds) == (result.peak_memory_bytes, result.parts,
                                                                     result.seconds)
