"""Random and damaged input: every loader, config, variable and command answers, or says what is wrong in a sentence.

The inputs are the same in every run. A failure is shown as small as possible, with the input to put into a test.
"""
import json
import math
import struct
import zipfile

import numpy as np
import pytest
import torch
from hybridvae import cli, core, images, training
from hybridvae.cli import app
from hybridvae.core import HybridVAEError, build_model, load_model, load_record, load_records, save_model
from hybridvae.data import data_root, read_array
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.priors import FlowPrior
from hybridvae.records import read_json
from hybridvae.vae import VAE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

SMALL_VAE = {"image_size": 16, "z_dim": 2, "width": 4, "multipliers": [1], "patch": 4, "sigma": 0.1}
SMALL_UNET = {"image_size": 16, "width": 4, "multipliers": [1], "attention": [], "patch": 4}
# no number here makes a network that would fill the memory
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([-1, 0, 1, 2, 3, 7, 16, 2**40, 2**70]),
                   st.sampled_from([0.5, -0.0, 1e300, math.nan, math.inf]), st.text(max_size=4),
                   st.lists(st.integers(-1, 4), max_size=3), st.just({}), st.just({"name": "x"}))


def inputs(n):
    "n inputs, the same in every run, without a limit of time for one of them."
    return settings(max_examples=n, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def answers(function, *args):
    "The function returns, or raises a `HybridVAEError` of one line that ends in a full stop."
    try:
        return function(*args)
    except HybridVAEError as error:
        message = str(error)
        assert message.endswith(".") and "\n" not in message and len(message) < 2_000, message


@st.composite
def damages(draw, content):
    "The bytes of a file with some of them replaced, removed or added."
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(("replace", "cut", "insert")))
        if kind == "replace" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[place:place + draw(st.integers(1, 1 + len(changed)))]
        else:
            changed[place:place] = draw(st.binary(max_size=20))
    return bytes(changed)


@st.composite
def changed(draw, value):
    "A nested config with one of its values replaced, removed, or joined by another."
    value = json.loads(json.dumps(value))
    inner = value
    while True:
        key = draw(st.sampled_from(sorted(inner)))
        if not (isinstance(inner[key], dict) and inner[key]) or draw(st.booleans()):
            break
        inner = inner[key]
    kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
    if kind == "remove":
        del inner[key]
    else:
        inner[key if kind == "replace" else draw(st.text(max_size=6))] = draw(VALUES)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def whole(folder):
    "The bytes of whole files, by suffix."
    save_model(VAE(**SMALL_VAE), folder / "a.safetensors")
    np.save(folder / "a.npy", np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3))
    np.savez(folder / "a.npz", arr_0=np.load(folder / "a.npy"))
    record = {"experiment": "vae", "dataset": "shapes", "subset": None, "seed": 0, "config": {}, "evaluations": []}
    (folder / "a.json").write_text(json.dumps(record))
    return {path.suffix: path.read_bytes() for path in folder.glob("a.*")}


# --- files ----------------------------------------------------------------------------------------------------------

def load(path):
    "What the package makes of a file, by its suffix."
    if path.suffix == ".safetensors":
        return load_model(path)
    if path.suffix == ".npy":
        return read_array(path, (None, 8, 8, 3))
    if path.suffix == ".npz":
        return images._read_array(path, 8)
    return load_record(path), read_json(path, "experiment", "config"), load_records(path.parents[2])


@pytest.mark.parametrize("suffix, n", [(".safetensors", 800), (".npy", 800), (".npz", 800), (".json", 800)])
def test_a_damaged_file_is_read_or_refused(folder, whole, suffix, n):
    path = folder / "x" / "y" / f"seed0{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)

    @inputs(n)
    @given(damages(whole[suffix]))
    def check(content):
        path.write_bytes(content)
        answers(load, path)

    check()
    path.write_bytes(whole[suffix])
    assert load(path) is not None
    path.unlink()


def test_a_weights_file_whose_config_was_changed_is_read_or_refused(folder, whole):
    state, path = VAE(**SMALL_VAE).state_dict(), folder / "changed.safetensors"

    @inputs(250)
    @given(changed(VAE(**SMALL_VAE).config))
    def check(config):
        from safetensors.torch import save_file

        save_file(state, path, {"config": json.dumps(config)})
        answers(load_model, path)

    check()


@pytest.mark.parametrize("config", [
    VAE(**SMALL_VAE).config | {"width": 200_000}, VAE(**SMALL_VAE).config | {"z_dim": 2**36},
    DiffuseVAE(SMALL_VAE, SMALL_UNET).config | {"unet": SMALL_UNET | {"width": 150_000}}])
def test_a_config_of_another_size_than_its_file_is_refused_before_memory_is_asked_for(folder, config, monkeypatch):
    "A network of hundreds of gigabytes is not begun."
    from safetensors.torch import save_file

    path, built = folder / "huge.safetensors", []
    save_file(build_model({k: v for k, v in config.items() if k == "model"} | (
        SMALL_VAE if config["model"] == "VAE" else {"vae": SMALL_VAE, "unet": SMALL_UNET})).state_dict(), path,
        {"config": json.dumps(config)})
    inner = core.build_model
    monkeypatch.setattr(core, "build_model", lambda c: built.append(torch.empty(0).device.type) or inner(c))
    with pytest.raises(HybridVAEError, match="names a model of .* numbers, but there are"):
        load_model(path)
    assert built == ["meta"]


def test_an_array_whose_header_promises_more_than_the_file_has_is_refused(folder):
    path = folder / "promise.npy"
    np.save(path, np.zeros((2, 8, 8, 3), np.uint8))
    content = path.read_bytes()
    size = struct.unpack("<H", content[8:10])[0]
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2000000000000, 8, 8, 3), }".ljust(size - 1) + "\n"
    path.write_bytes(content[:10] + header.encode() + content[10 + size:])
    with pytest.raises(HybridVAEError, match="not a whole .npy file"):
        read_array(path, (None, 8, 8, 3))
    with zipfile.ZipFile(folder / "promise.npz", "w") as file:
        file.write(path, "arr_0.npy")
    with pytest.raises(HybridVAEError, match="promise.npz cannot be used"):
        images._read_array(folder / "promise.npz", 8)


# --- configs, variables, commands -----------------------------------------------------------------------------------

CONFIGS = {"VAE": VAE(**SMALL_VAE, prior=FlowPrior(2, hidden=4, layers=2).config).config,
           "DiffuseVAE": DiffuseVAE(SMALL_VAE, SMALL_UNET, z_guidance=True).config}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_config_makes_a_model_or_a_sentence(name):
    @inputs(250)
    @given(changed(CONFIGS[name]))
    def check(config):
        try:
            answers(build_model, config)
        except ValueError as error:  # the class's own
            assert str(error)

    check()


@pytest.mark.parametrize("variable, read", [
    ("HYBRIDVAE_BUDGET", lambda: core.budget(10)), ("HYBRIDVAE_DATA", data_root),
    ("HYBRIDVAE_PRECISION", lambda: training.choose_precision(torch.device("cpu"))),
    ("HYBRIDVAE_COMPILE", lambda: training.choose_compile(torch.device("cpu"), 1.0))])
def test_a_variable_may_hold_anything(monkeypatch, variable, read):
    @inputs(100)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12))
    def check(text):
        monkeypatch.setenv(variable, text)
        answers(read)

    check()


OPTIONS = ("--weights --dataset --n --seed --seeds --out --steps --sampler --batch --prior --form --vae --kimg --lr "
           "--model --images --json --cpu --small --components --numbers --batch-size --vary").split()
WORDS = st.one_of(st.sampled_from(OPTIONS), st.integers(-5, 2**66).map(str), st.floats().map(str),
                  st.sampled_from("vae ddpm dpmpp nowhere ../x.png ~/x x.npz int8 1e999 -- --n=3 --seed=-1".split()),
                  st.text(st.characters(exclude_categories=["Cs"]), max_size=5))


def test_any_words_after_a_command_are_answered_with_a_sentence(monkeypatch, tmp_path):
    "Weights and data sets do not exist, so no command gets as far as computing."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "data"))
    commands = "data train sample reconstruct interpolate export quantize distill evaluate".split()

    @inputs(700)
    @given(st.sampled_from(commands), st.lists(WORDS, max_size=6))
    def check(name, words):
        given = ["nowhere"] if name == "data" else ["--weights", "nowhere.safetensors"] if name != "train" else []
        answer = CliRunner().invoke(app, [name, *words, *given, *(["--dataset", "nowhere"] if name == "train" else [])])
        error = answer.exception
        assert error is None or isinstance(error, SystemExit) or cli._sentence(error), (name, words, repr(error))

    check()
    assert not list(tmp_path.iterdir())
