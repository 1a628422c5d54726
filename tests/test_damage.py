"""Files of a run and of the cache that are damaged, truncated, foreign or changed: never believed.

Each is refused with one sentence that names it, or made again; what was killed half-way is not taken for whole.
"""
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complains, files_below
from hybridvae import core, data, images, runs, training
from hybridvae.core import RECORD_KEYS, load_model, load_record, randn, save_model, weights_hash, write_record
from hybridvae.custom import train_model
from hybridvae.data import ImageData, load_data, prepare_folder
from hybridvae.entries import Entry
from hybridvae.metrics import describe
from hybridvae.rating import draw_pairs, rating_table, read_choices, write_rating
from hybridvae.training import TrainConfig, latest_checkpoint, train
from PIL import Image
from safetensors.torch import load_file, save_file

CONFIG = {"model": "VAE", "image_size": 16, "z_dim": 2, "width": 4, "multipliers": [1], "patch": 4}
SETTINGS = {"kimg": 0.032, "batch_size": 8, "n_slices": 2, "precision": "fp32"}  # four steps
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)


def a_vae(seed=0):
    torch.manual_seed(seed)
    return core.build_model(CONFIG)


def few(name="train"):
    return ImageData("own", name, PIXELS)


def steps(folder, n, seed=0):
    "Four steps of a small VAE, or what is left of them; a limit of no minutes ends them after n."
    for _ in range(n):
        result = train(a_vae(seed), few(), TrainConfig(**SETTINGS), folder, minutes=None if n == 4 else 0, cpu=True,
                       progress=False)
        if result.finished:
            break
    return result


def change(path, function):
    "Write what a function makes of a safetensors file's tensors."
    state = load_file(path)
    save_file(function(state) or state, path)


# --- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run that was stopped after its second step."
    folder = tmp_path_factory.mktemp("stopped")
    assert steps(folder, 2).step == 2
    return folder


def unsealed(checkpoint):
    "As checkpoints were before they had checksums: what is in them has to be looked at."
    path = checkpoint / "progress.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("checksum", "state_hash")}))


WEIGHT = "weight/encoder.net.0.weight"
MOMENT = "optimizer/encoder.net.0.weight/exp_avg"
STATES = {
    "nothing in it": lambda s: {"x": torch.zeros(1)},
    "a tensor is missing": lambda s: {k: v for k, v in s.items() if k != WEIGHT},
    "a moment is missing": lambda s: {k: v for k, v in s.items() if k != MOMENT},
    "a tensor too many": lambda s: s | {"weight/colour": torch.zeros(1)},
    "of no kind": lambda s: s | {"colour": torch.zeros(1)},
    "another shape": lambda s: s | {WEIGHT: torch.zeros(3)},
    "one that would be broadcast": lambda s: s | {WEIGHT: torch.zeros(1)},
    "a moment of another shape": lambda s: s | {MOMENT: torch.zeros(2, 2)},
    "another type": lambda s: s | {WEIGHT: s[WEIGHT].to(torch.int64)},
    "not a number": lambda s: s | {WEIGHT: s[WEIGHT] * float("nan")},
    "an infinite moment": lambda s: s | {MOMENT: s[MOMENT] + float("inf")},
    "a weight changed": lambda s: s | {WEIGHT: s[WEIGHT] + 1e-3},
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("old", [False, True], ids=["", "without checksums"])
def test_a_checkpoint_whose_state_was_changed_is_refused(stopped, tmp_path, name, old):
    if old and name == "a weight changed":
        pytest.skip("nothing shows it")
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    checkpoint = latest_checkpoint(tmp_path)
    change(checkpoint / "state.safetensors", STATES[name])
    if old:
        unsealed(checkpoint)
    with complains(checkpoint, "is damaged", "remove it and run again"):
        steps(tmp_path, 1)


def test_any_value_of_a_checkpoints_progress_that_was_changed_is_noticed(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = latest_checkpoint(tmp_path) / "progress.json"
    whole = json.loads(path.read_text())
    assert len(whole) > 8
    for key in whole.keys() - {"checksum"}:
        for value in (1.5, "x", None, [1], {}):
            path.write_text(json.dumps(whole | {key: value}))
            with complains(path, "was changed after it was written, or is damaged"):
                steps(tmp_path, 1)
    for text in ("[" * 100_000, "\0", '{"step": NaN}', "[]", "1"):
        path.write_text(text)
        with complains(path.parent, "is damaged"):
            steps(tmp_path, 1)


@pytest.mark.parametrize("key, value", [("step", "2"), ("step", -1), ("step", 3), ("step", None), ("history", 1),
                                        ("since_point", "x"), ("seconds", "long"), ("parts", 7)])
def test_an_older_checkpoint_with_values_that_cannot_be_is_refused(stopped, tmp_path, key, value):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    checkpoint = latest_checkpoint(tmp_path)
    unsealed(checkpoint)
    path = checkpoint / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with complains(checkpoint, "is damaged"):
        steps(tmp_path, 1)


def test_an_older_checkpoint_without_checksums_goes_on(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    unsealed(latest_checkpoint(tmp_path))
    assert steps(tmp_path, 2).finished


def test_what_is_no_checkpoint_is_passed_over(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert latest_checkpoint(tmp_path).name == "checkpoint-2" and steps(tmp_path, 2).finished


def test_a_checkpoint_of_another_model_is_refused_by_its_config(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    other = core.build_model(CONFIG | {"width": 8})
    with complains(tmp_path, "another config or seed"):
        train(other, few(), TrainConfig(**SETTINGS), tmp_path, cpu=True, progress=False)


# --- killed while it writes -----------------------------------------------------------------------------------------

def killed_in(function, module, name, after=0):
    "Run a function in a process of its own, which is killed when it calls a function of a module for the n-th time."
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not here
        calls, inner = [], getattr(module, name)

        def killed(*args, **kwargs):
            calls.append(args)
            if len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)
        setattr(module, name, killed)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_kill_at_any_moment_of_a_record_leaves_the_old_one_whole(tmp_path):
    record = {**dict.fromkeys(RECORD_KEYS, 0), "experiment": "vae", "dataset": "shapes", "subset": None, "seed": 0}
    path = write_record(tmp_path, record)
    for module, name in ((core.tempfile, "mkdtemp"), (Path, "write_text"), (core.os, "replace")):
        assert killed_in(lambda: write_record(tmp_path, record | {"kimg": 1}), module, name)
        assert load_record(path) == record and core.load_records(tmp_path) == [record]
    assert load_record(write_record(tmp_path, record | {"kimg": 1}))["kimg"] == 1


@needs_fork
def test_a_kill_at_any_moment_of_a_checkpoint_leaves_the_one_before(stopped, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(stopped, whole)
    steps(whole, 2)
    want = load_file(latest_checkpoint(whole) / "state.safetensors")
    for i, (module, name, after) in enumerate((
            (training, "save_model", 0), (training, "save_file", 0), (Path, "write_text", 0), (core.os, "replace", 0),
            (core.os, "replace", 1), (training.shutil, "rmtree", 0))):
        folder = tmp_path / str(i)
        shutil.copytree(stopped, folder)
        assert killed_in(functools.partial(steps, folder, 1), module, name, after), name
        assert latest_checkpoint(folder).name in ("checkpoint-2", "checkpoint-3")
        while not steps(folder, 1).finished:
            pass
        end = load_file(latest_checkpoint(folder) / "state.safetensors")
        assert all(torch.equal(end[key], want[key]) for key in want), name
        assert [p.name for p in folder.glob("*checkpoint-*")] == ["checkpoint-4"]  # nothing hidden either


@needs_fork
def test_a_kill_at_any_moment_of_the_data_cache_leaves_none_and_the_next_is_whole(tmp_path):
    source, root = tmp_path / "photos", tmp_path / "cache"
    source.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(source / f"{i:02d}.png")
    prepare = lambda: prepare_folder(source, "mine", 16, root)
    moments = [(data, "crop_square", k) for k in (0, 5, 11)] + [(data, "_write_images", 1), (core.os, "replace", 0)]
    for module, name, after in moments:
        assert killed_in(prepare, module, name, after), name
        assert data.prepared_names(root) == [] and not (root / "mine").exists()
    prepare()
    assert len(data.load_folder("mine", "train", root)) == 11
    assert sorted(p.name for p in (root / "mine").iterdir()) == ["origin.json", "test_images.npy", "train_images.npy"]


# --- images that an evaluation keeps --------------------------------------------------------------------------------

class Noise(core.Model):
    "Its images are noise."

    def __init__(self):
        super().__init__()
        self.config, self.image_shape, self.drawn = {"model": "Noise"}, (3, 16, 16), 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def sample(self, n, *, generator=None, **options):
        self.drawn += 1
        return randn((n, 3, 16, 16), generator)


class Pixels(torch.nn.Module):
    "A network whose features are means of patches."

    name = "pixels"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    def features(self, x):
        return self(x)


def kept(**arrays):
    def write(path):
        np.savez(path, **arrays)
    return write


def bomb(path):
    "Sixteen images by its header, which promises four terabytes."
    header = np.lib.format.magic(1, 0) + (
        lambda text: len(text).to_bytes(2, "little") + text)(
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (5000000000, 3, 16, 16), }\n")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", header)
        file.writestr("seconds.npy", header)


GOOD = np.zeros((8, 3, 16, 16), np.uint8)
KEPT = {
    "no archive": lambda path: path.write_bytes(b"hello"), "nothing": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "a byte changed": lambda path: path.write_bytes(path.read_bytes()[:900] + bytes([255 - path.read_bytes()[900]])
                                                    + path.read_bytes()[901:]),
    "fewer": kept(images=GOOD[:3], seconds=1.0), "floats": kept(images=GOOD.astype(float), seconds=1.0),
    "another size": kept(images=np.zeros((8, 3, 8, 8), np.uint8), seconds=1.0),
    "channels last": kept(images=GOOD.transpose(0, 2, 3, 1), seconds=1.0),
    "no time": kept(images=GOOD), "many times": kept(images=GOOD, seconds=np.zeros(3)),
    "a time that is no number": kept(images=GOOD, seconds=np.nan), "words": kept(images=GOOD, seconds="x"),
    "negative": kept(images=GOOD, seconds=-1.0), "terabytes": bomb,
    "objects": lambda path: np.savez(path, images=np.array([{}], object), seconds=1.0),
}


@pytest.mark.parametrize("name", KEPT)
def test_images_kept_for_an_evaluation_are_drawn_again_where_they_are_not_what_was_kept(tmp_path, name):
    network = Pixels()
    reference = {"held-out": describe(network, few().tensor())}

    def look(model, folder=None, check=lambda: None):
        return runs.evaluate(model, [network], [reference], {"sampler": "ddim", "steps": 1, "n": 24}, batch=8,
                             precision="fp32", progress=False, keep=folder, check=check)["metrics"]
    want, calls = look(Noise()), []

    def stop():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        look(Noise(), tmp_path, stop)
    assert files_below(tmp_path) == ["0.npz", "8.npz"]
    KEPT[name](tmp_path / "8.npz")
    model = Noise()
    assert look(model, tmp_path) == want and model.drawn == 2  # the damaged batch, and the one that was missing


def test_the_package_pickles_nothing(tmp_path):
    for path in core.package_folder().glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = re.search(r"allow_pickle=True|pickle\.loads?\(|torch\.save\(|weights_only=False|extractall", text)
        assert not found, (path, found)
    runs._keep_features(tmp_path / "f.npz", [Pixels()], [describe(Pixels(), few().tensor())])
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert {name: file[name].dtype for name in file} == {"texture": np.float16, "pixels": np.float16}


# --- the files of an entry and of a training ------------------------------------------------------------------------

ENTRY = Entry("vae", "shapes", CONFIG | {"image_size": 32}, {"kimg": 0.016, "batch_size": 8})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An entry that is trained, and its record."
    folder = tmp_path_factory.mktemp("entry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 24, "test": 16})
        runs._forget()
        yield folder, runs.run_entry(ENTRY, [ENTRY], folder, cpu=True, progress=False)


def entry_again(folder):
    return runs.run_entry(ENTRY, [ENTRY], folder, cpu=True, progress=False)


def test_weights_of_another_model_beside_a_finished_training_are_refused(trained, tmp_path):
    for i, other in enumerate((core.build_model(ENTRY.model), core.build_model(CONFIG))):
        folder = tmp_path / str(i)
        shutil.copytree(trained[0], folder)
        (folder / "shapes" / "vae" / "seed0.json").unlink()
        save_model(other, ENTRY.folder(folder) / "model.safetensors")
        with complains(ENTRY.folder(folder), "not those that were trained there", "remove"):
            entry_again(folder)


@pytest.mark.parametrize("name", ["trained.json", "measured.json"])
def test_any_value_of_an_entrys_files_that_was_changed_is_noticed(trained, tmp_path, name):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "shapes" / "vae" / "seed0.json").unlink()
    path = ENTRY.folder(tmp_path) / name
    if name == "measured.json":
        path.write_text(json.dumps(core.sealed({"config_hash": "0", "weights_hash": "0", "evaluations": []})))
    whole = json.loads(path.read_text())
    for key in whole.keys() - {"checksum"}:
        path.write_text(json.dumps(whole | {key: [1]}))
        with complains(path, "was changed after it was written, or is damaged"):
            entry_again(tmp_path)


def test_weights_of_another_model_in_a_finished_trainings_folder_are_refused(tmp_path):
    again = lambda seed=0: train_model(a_vae(seed), SETTINGS, (few(), few("test")), tmp_path, cpu=True, progress=False)
    assert again() and again()
    path = tmp_path / "training.json"
    whole = path.read_text()
    for other in (a_vae(seed=5), core.build_model(CONFIG | {"width": 8})):
        save_model(other, tmp_path / "model.safetensors")
        with complains(tmp_path, "not those that were trained there"):
            again()
    path.write_text(whole.replace('"seed": 0', '"seed": 1'))
    with complains(tmp_path, "was changed after it was written"):
        again()


def test_official_numbers_that_are_damaged_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path))
    (tmp_path / "celeba256").mkdir()
    faces = ImageData("celeba64", "train", PIXELS, ids=np.arange(1, 17, dtype=np.int32))
    path = tmp_path / "celeba256" / "train_ids.npy"
    np.save(path, np.arange(1, 5, dtype=np.int32))
    assert runs._sources(faces)["full-size originals"].sum() == 4
    for content in (b"", path.read_bytes()[:-1], b"hello"):
        path.write_bytes(content)
        with complains(path, "remove it"):
            runs._sources(faces)
    np.save(path, np.array([{}]), allow_pickle=True)
    with complains(path, "remove it"):
        runs._sources(faces)


# --- prepared images ------------------------------------------------------------------------------------------------

def test_prepared_images_of_two_sizes_are_no_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "train_images.npy", PIXELS)
    np.save(tmp_path / "mine" / "test_images.npy", np.zeros((4, 24, 24, 3), np.uint8))
    for split in ("train", "test"):
        with complains(tmp_path / "mine", "16 and 24 pixels"):
            load_data("mine", split)


def test_a_header_that_claims_terabytes_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    "An array in an archive: its header, its size in the archive and what is asked for must agree first."
    asked = []
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **kwargs: asked.append(args))
    bomb(tmp_path / "a.npz")
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as file:
        file.writestr("arr_0.npy", zipfile.ZipFile(tmp_path / "a.npz").read("images.npy").replace(
            b"3, 16, 16", b"16, 16, 3"))
    for name, words in (("a", "arr_0"), ("b", "whole")):
        with complains(tmp_path / f"{name}.npz", words):
            images._read_array(tmp_path / f"{name}.npz", 16)
    for array in (np.zeros((1_000, 16, 16, 3)), np.zeros((8, 24, 24, 3), np.uint8), np.array([{}] * 8)):
        np.savez(tmp_path / "c.npz", arr_0=array)
        with complains(tmp_path / "c.npz", "needed"):
            images._read_array(tmp_path / "c.npz", 16)
    assert asked == []


def test_a_picture_that_claims_a_billion_pixels_is_refused(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "big.png").write_bytes(content)
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with complains(tmp_path, "big.png", "cannot be read"):
        prepare_folder(tmp_path, "mine", 16, tmp_path / "cache")
    with complains("big.png", "cannot be used"):
        images.read_images([tmp_path / "big.png"], 16)


def test_a_tampered_archive_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    "A path in it that leads out of the folder, and a link: its checksum is not the published one."
    root = tmp_path / "cache"
    download = tmp_path / "download.tar.gz"
    with tarfile.open(download, "w:gz") as file:
        for name in ("../../escaped", "/tmp/escaped-from-hybridvae", "cifar-10-batches-py/data_batch_1"):
            about = tarfile.TarInfo(name)
            about.size = 4
            file.addfile(about, io.BytesIO(b"evil"))
    from torchvision.datasets import cifar, utils

    def fetch(url, path, filename=None, md5=None, **options):
        target = Path(path) / (filename or Path(url).name)
        shutil.copy(download, target)
        if md5 and hashlib.md5(target.read_bytes()).hexdigest() != md5:
            raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr(utils, "download_url", fetch)
    assert cifar.download_and_extract_archive is utils.download_and_extract_archive
    with complains(root / "cifar10", "could not be downloaded", "corrupted"):
        data.prepare_cifar10(root)
    assert files_below(tmp_path) == ["cache", "download.tar.gz"] and not Path("/tmp/escaped-from-hybridvae").exists()


# --- weights of strange types ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_of_a_type_that_weights_do_not_have_are_refused(tmp_path, dtype, recwarn):
    path = save_model(a_vae(), tmp_path / "vae.safetensors")
    state = load_file(path)
    name = "encoder.net.0.bias"
    save_file(state | {name: state[name].to(dtype)}, path, {"config": json.dumps(a_vae().config)})
    with complains(path, "does not hold a hybridvae model", name):
        load_model(path)
    assert not recwarn.list


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int8, core.INT4], ids=str)
def test_numbers_that_are_not_finite_are_found_in_weights_of_every_kind(tmp_path, value, dtype):
    path = save_model(a_vae(), tmp_path / "vae.safetensors", dtype)
    state = load_file(path)
    for name in [name for name, t in state.items() if t.is_floating_point()][:4]:
        broken = state[name].clone()
        broken.view(-1)[0] = value
        save_file(state | {name: broken}, path, {"config": json.dumps(a_vae().config)})
        with complains(path, "not finite"):
            load_model(path)


# --- choices of raters ----------------------------------------------------------------------------------------------

@pytest.fixture
def rated(tmp_path):
    sets = {name: torch.zeros(4, 3, 16, 16, dtype=torch.uint8) for name in ("a", "b")}
    write_rating(sets, tmp_path, n=4)
    assert len(draw_pairs(sets, 4)) == 4
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pairs": 3}', b'{"pairs": [1]}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_key_of_a_rating_is_named(rated, content):
    (rated / "key.json").write_bytes(content)
    (rated / "choices-x.csv").write_text("pair,coherence,sharpness,structural integrity,rater\n1,a,a,a,x\n")
    with complains(rated / "key.json", "is damaged"):
        rating_table(rated)


COLUMNS = "pair,coherence,sharpness,structural integrity,rater\n"


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe\x00", b"pair\n1\n", *((COLUMNS + row).encode() for row in (
        "\0\n", "²,a,a,a,x\n", ",\n", "9" * 5000 + ",a,a,a,x\n", '1,"' + "x" * 200_000 + "\n")),
    b"coherence,sharpness,structural integrity,rater,pair\na\n"])
def test_a_damaged_table_of_choices_is_named(rated, content):
    path = rated / "choices.csv"
    path.write_bytes(content)
    with complains(path):
        read_choices(path, 4)


def test_the_weights_hash_is_kept_beside_the_weights(trained):
    folder, record = trained
    kept = json.loads((ENTRY.folder(folder) / "trained.json").read_text())["weights_hash"]
    assert kept == record["weights_hash"] == weights_hash(load_model(ENTRY.folder(folder) / "model.safetensors"))


