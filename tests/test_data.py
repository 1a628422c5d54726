"""Shapes and their factors, CIFAR-10 from an archive or from arrays, what can go wrong with files, and batches."""
import colorsys
import hashlib
import io
import itertools
import pickle
import resource
import sys
import tarfile
import tracemalloc
import urllib.error
import urllib.request
import warnings

import numpy as np
import pytest
import torch
from conftest import complains, disk_full, files_below
from hybridvae import core, data
from hybridvae.core import Draws, to_float
from hybridvae.data import (CIFAR10_CLASSES, FACTORS, SCENE_FACTORS, SHAPE_NAMES, SHAPES_SIZES, Batches, ImageData,
                            draw_scenes, draw_shapes, factor_targets, load_celeba, load_cifar10, load_data,
                            prepare_cifar10, shapes_factors)
from torchvision.datasets import CIFAR10

ARRAYS = ["test_images.npy", "test_labels.npy", "train_images.npy", "train_labels.npy"]


# --- Shapes ---------------------------------------------------------------------------------------------------------

def test_shapes_are_the_same_for_the_same_number():
    some = np.array([5, 0, 123_456, 5])
    factors = shapes_factors(some)
    np.testing.assert_array_equal(factors, np.concatenate([shapes_factors([i]) for i in some]))
    np.testing.assert_array_equal(draw_shapes(factors), np.concatenate([draw_shapes(f[None]) for f in factors]))
    np.testing.assert_array_equal(factors[0], factors[3])


def splitmix64(counter):
    "SplitMix64's finaliser in plain integers, as its authors define it: in [0, 1)."
    z = counter * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) / 2**64


@pytest.mark.parametrize("number", [0, 1, 19_999, 1_000_000_000])
def test_factors_never_change(number):
    "Records compare runs of different days and machines: the same number must mean the same image."
    (found,) = shapes_factors([number])
    for k, (value, (low, high)) in enumerate(zip(found, FACTORS.values())):
        want = low + (high - low) * splitmix64(number * len(FACTORS) + k + 1)
        assert value == pytest.approx(int(want) if isinstance(low, int) else want, rel=1e-6)


@pytest.fixture(scope="module")
def small_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SHAPES_SIZES, "train", 600)
        patch.setitem(data.SHAPES_SIZES, "test", 300)
        return load_data("shapes"), load_data("shapes", "test")


def test_no_image_is_in_both_splits(small_shapes):
    starts = {}
    for split, size in SHAPES_SIZES.items():  # the published sizes
        starts[split] = shapes_factors((0 if split == "train" else 1_000_000_000) + np.arange(size))
    assert (starts["train"].shape, starts["test"].shape) == ((20_000, 8), (4_000, 8))
    train, test = ({row.tobytes() for row in s} for s in starts.values())
    assert len(train) == 20_000 and len(test) == 4_000 and not train & test
    for part, name in zip(small_shapes, starts):  # and those are the factors of the images that are loaded
        np.testing.assert_array_equal(part.labels, starts[name][:len(part)])
        np.testing.assert_array_equal(part.images[:20], draw_shapes(part.labels[:20]))


def test_factors_fill_their_ranges_and_are_independent():
    factors = shapes_factors(np.arange(20_000))
    for column, (name, (low, high)) in zip(factors.T, FACTORS.items()):
        assert low <= column.min() and column.max() <= high, name
        spread = (column.max() - column.min()) / (high - 1 - low if name == "shape" else high - low)
        assert spread > 0.999, name
    assert sorted(set(factors[:, 0])) == list(range(len(SHAPE_NAMES)))
    off_diagonal = np.corrcoef(factors.T) - np.eye(len(FACTORS))
    assert abs(off_diagonal).max() < 5 / np.sqrt(len(factors))


def test_a_shape_has_the_hue_and_the_place_that_its_factors_say():
    factors = shapes_factors(np.arange(300))
    for image, f in zip(draw_shapes(factors, 64), factors):
        _, hue, _, x, y, *_ = f
        row, column = (int(64 * (0.5 + v)) for v in (y, x))
        seen, saturation, value = colorsys.rgb_to_hsv(*image[row, column] / 255)
        assert abs((seen - hue + 0.5) % 1 - 0.5) < 0.004 and abs(saturation - 0.9) < 0.01 and abs(value - 0.95) < 0.01


def test_the_ground_has_its_own_hue():
    factors = shapes_factors(np.arange(300))
    for image, ground in zip(draw_shapes(factors), factors[:, 6]):
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]  # no shape reaches them
        seen, saturation, _ = colorsys.rgb_to_hsv(*corners.mean(axis=0) / 255)
        assert abs((seen - ground + 0.5) % 1 - 0.5) < 0.02 and abs(saturation - 0.4) < 0.04


# --- scenes ---------------------------------------------------------------------------------------------------------

SCENE = {name: i for i, name in enumerate(SCENE_FACTORS)}


def scene_rows(n, **factors):
    "Factors of n scenes, some of them set: an upright, easy object in the middle with nothing behind."
    rows = shapes_factors(np.arange(n), SCENE_FACTORS)
    plain = {"x": 0, "y": 0, "rotation": 0, "difficulty": 0, "behind": 1, "size": 0.4}
    for name, value in (plain | factors).items():
        rows[:, SCENE[name]] = value
    return rows


def test_scenes_are_decided_by_their_numbers_and_no_scene_is_in_both_splits(monkeypatch):
    monkeypatch.setitem(data.SHAPES_SIZES, "train", 60)
    monkeypatch.setitem(data.SHAPES_SIZES, "test", 30)
    train, test = load_data("scenes"), load_data("scenes", "test")
    np.testing.assert_array_equal(train.images[7:9], draw_scenes(shapes_factors(np.arange(7, 9), SCENE_FACTORS)))
    assert train.label_names == tuple(SCENE_FACTORS) and train.labels.shape == (60, 15)
    assert not {row.tobytes() for row in train.labels} & {row.tobytes() for row in test.labels}
    assert train.mask("difficulty", (0.5, 1.0)).mean() == pytest.approx(0.5, abs=0.2)
    with complains("'period' cannot be (2, 1)", "within 0.0 to 1.0"):
        train.mask("period", (2, 1))


def spectrum(image):
    "Power of a square patch from the middle of a scene, its mean taken off: rows are frequencies from top to bottom."
    patch = image[11:21, 11:21].mean(axis=-1).astype(float)
    return abs(np.fft.fft2(patch - patch.mean())) ** 2


def test_a_square_has_stripes_a_triangle_checks_and_a_cross_dots():
    "Stripes vary along one axis only; checks along both at once; a cross's dots along each axis."
    one_way, oblique = [], []
    for shape in range(3):
        power = sum(spectrum(image) for image in draw_scenes(scene_rows(60, shape=shape, direction=0, hue=0.6)))
        one_way.append(power[0].sum() / power.sum())
        oblique.append(power[1:, 1:].sum() / power.sum())
    assert one_way[0] > 0.95 and oblique[1] > 0.6 and max(oblique[0], oblique[2]) < oblique[1] and one_way[2] < 0.8


def test_the_period_grows_with_the_factor_and_with_the_hue():
    def changes(**factors):
        "Mean step from column to column of the brightest channel, which does not depend on the hue."
        inside = draw_scenes(scene_rows(200, shape=0, direction=0, amplitude=0.6, **factors))[:, 10:22, 10:22]
        return abs(np.diff(inside.max(axis=-1).astype(int), axis=2)).mean()

    assert changes(hue=0.1, period=0) > changes(hue=0.1, period=0.5) > changes(hue=0.1, period=1)
    assert changes(hue=0, period=0.5) > 1.2 * changes(hue=0.7, period=0.5)


def test_hard_scenes_have_a_smaller_object_less_contrast_and_more_grain():
    easy, hard = (draw_scenes(scene_rows(200, difficulty=d)).astype(float) for d in (0, 1))
    bare = [draw_scenes(scene_rows(200, difficulty=d), texture=0.0).astype(float) for d in (0, 1)]
    corner = np.s_[:, :3, :3]
    grain = [(a - b)[corner].std() for a, b in zip((easy, hard), bare)]
    assert grain[0] == pytest.approx(0.02 * 255, rel=0.1) and grain[1] == pytest.approx(0.13 * 255, rel=0.1)
    contrast = [np.mean([np.ptp(image[16, 16]) for image in images]) for images in bare]
    assert contrast[1] == pytest.approx(0.4 * contrast[0], rel=0.02)
    differs = [(abs(images - images[:, :1, :1]).sum(axis=-1) > 20).mean() for images in bare]
    assert differs[1] < 0.75 * differs[0]


def test_one_scene_in_four_has_a_disc_behind_which_the_object_hides_in_part():
    rows = shapes_factors(np.arange(4_000), SCENE_FACTORS)
    assert (rows[:, SCENE["behind"]] < 0.25).mean() == pytest.approx(0.25, abs=0.02)
    with_disc, without = (draw_scenes(scene_rows(100, shape=0, behind=b), texture=0.0) for b in (0.1, 0.9))
    differs = (with_disc != without).any(axis=-1)
    assert differs.any(axis=(1, 2)).all() and not differs[:, 12:20, 12:20].any()


def test_targets_of_factors_know_a_turn_and_a_disc_that_is_not_there():
    rows = torch.from_numpy(shapes_factors(np.arange(500), SCENE_FACTORS))
    targets = factor_targets(rows)
    assert list(targets) == list(SCENE_FACTORS)
    quarter = rows.clone()
    quarter[:, SCENE["direction"]] += 0.25  # looks alike
    torch.testing.assert_close(factor_targets(quarter)["direction"], targets["direction"], atol=1e-4, rtol=0)
    away = rows[:, SCENE["behind"]] >= 0.25
    for name in ("behind", "behind_hue", "behind_place"):
        assert (targets[name][away] == 0).all() and (targets[name][~away].norm(dim=1) - 1).abs().max() < 1e-5
    assert list(factor_targets(torch.from_numpy(shapes_factors(np.arange(5))))) == list(FACTORS)


# --- shapes again ---------------------------------------------------------------------------------------------------

def test_the_kinds_look_different_and_larger_ones_cover_more():
    kinds = len(SHAPE_NAMES)
    f = np.repeat(shapes_factors([7]), kinds, axis=0)
    f[:, 0], f[:, 2:6] = range(kinds), [0.33, 0, 0, 0]
    images = draw_shapes(f).astype(int)
    for i in range(kinds):
        assert all(abs(images[i] - images[j]).sum(axis=-1).max() > 100 for j in range(i))
        g = np.repeat(f[i:i + 1], 4, axis=0)
        g[:, 2] = np.linspace(*FACTORS["size"], 4)
        covered = (abs(draw_shapes(g).astype(int) - images[i, 16, 16]).sum(axis=-1) < 5).sum(axis=(1, 2))
        assert (np.diff(covered) > 0).all()


def test_a_split_is_drawn_once_and_everybody_has_a_copy(monkeypatch):
    "What one does to its images another does not see, and another size or number is drawn anew."
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 1_100, "test": 50})
    drawn, inner = [], data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda f, size: drawn.append(len(f)) or inner(f, size))
    data._drawn.cache_clear()
    first, again = load_data("shapes"), load_data("shapes")
    assert sum(drawn) == 1_100 and first.fingerprint == again.fingerprint
    first.images[:], first.labels[:] = 0, 0
    assert load_data("shapes").fingerprint == again.fingerprint and sum(drawn) == 1_100
    assert data.load_shapes("test", 16).images.shape == (50, 16, 16, 3) and load_data("scenes", "test").name == "scenes"
    monkeypatch.setitem(data.SHAPES_SIZES, "test", 20)
    assert len(load_data("shapes", "test")) == 20 and sum(drawn) == 1_170
    data._drawn.cache_clear()
    with complains("no split 'dev'"):
        data.load_shapes("dev")


@pytest.mark.parametrize("arguments, words", [
    (("shape",), ("no data set 'shape'", "shapes", "cifar10")),
    (("shapes", "dev"), ("no split 'dev'", "train or test")),
    (("shapes", "train", 601), ("601", "from 1 to 600")), (("shapes", "train", 0), ("from 1 to 600",)),
    (("shapes", "train", -3), ("from 1 to 600",))])
def test_unknown_names_and_impossible_subsets_are_refused(monkeypatch, arguments, words):
    monkeypatch.setitem(data.SHAPES_SIZES, "train", 600)
    with complains(*words):
        load_data(*arguments)


def test_a_subset_is_the_first_images_with_their_labels(small_shapes):
    part = small_shapes[0].first(7)
    np.testing.assert_array_equal(part.images, small_shapes[0].images[:7])
    np.testing.assert_array_equal(part.labels, small_shapes[0].labels[:7])
    assert (len(part), part.image_size) == (7, 32) and part.tensor().shape == (7, 3, 32, 32)
    np.testing.assert_array_equal(part.tensor()[3, 1], part.images[3, :, :, 1])


def test_descriptions_say_how_many_of_which_images(small_shapes, arrays):
    train, test = small_shapes
    assert (train.description, test.description) == ("Shapes, 600 images", "Shapes, 300 held-out images")
    assert train.first(7).description == "Shapes, 600 images; the first 7"
    assert train.first(70).first(7).description == "Shapes, 600 images; the first 7"
    assert train.first(600).description == "Shapes, 600 images"
    assert load_cifar10("test", arrays.parent).description == "CIFAR-10, 4 held-out of 10,000 images"
    assert numbered(5).description == "numbered, 5 images"


# --- reading and choosing -------------------------------------------------------------------------------------------

@pytest.fixture(params=["memory", "read-only", "mapped", "slice of mapped", "every other"])
def stored(request, tmp_path):
    "The same 10 images and labels, the images stored in different ways."
    few = numbered(10)
    np.save(tmp_path / "x.npy", np.concatenate([few.images, few.images[::-1]]))
    mode = None if request.param in ("memory", "read-only", "every other") else "r"
    whole = np.load(tmp_path / "x.npy", mmap_mode=mode)
    if request.param == "every other":
        few.images = whole.repeat(2, axis=0)[:20:2]
        return few
    few.images = whole[:10] if request.param != "mapped" else np.load(tmp_path / "x.npy", mmap_mode="r")[:10]
    few.images.flags.writeable = request.param == "memory"
    return few


def test_however_images_are_stored_they_are_read_alike(stored):
    truth = numbered(10).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that cannot be written
        whole, pieces, floats = stored.tensor(), list(stored.batches(4)), stored.float()
    np.testing.assert_array_equal(whole.permute(0, 2, 3, 1), truth)
    assert [tuple(p.shape) for p in pieces] == [(4, 3, 4, 4), (4, 3, 4, 4), (2, 3, 4, 4)]
    assert torch.equal(torch.cat(pieces), whole) and whole.dtype == pieces[0].dtype == torch.uint8
    np.testing.assert_allclose(floats.permute(0, 2, 3, 1), truth / 127.5 - 1, atol=1e-6)
    assert floats.dtype == torch.float32 and torch.equal(stored.float(3), floats[:3])
    floats.zero_()
    np.testing.assert_array_equal(stored.images, truth)  # floats are a copy
    with complains("11", "from 1 to 10"):
        stored.float(11)


def test_classes_choose_their_images():
    classes = np.array([3, 0, 3, 9, 5], np.uint8)
    part = ImageData("cifar10", "train", numbered(5).images, classes, CIFAR10_CLASSES)
    assert part.mask("cat").tolist() == [True, False, True, False, False]
    assert part.mask("frog").tolist() == [False] * 5 and part.first(2).mask("cat").tolist() == [True, False]
    with complains("cifar10 has no class 'Cat'", *CIFAR10_CLASSES):
        part.mask("Cat")
    with complains("the class 'cat' takes no value", "3"):
        part.mask("cat", 3)


def test_cifar10_has_the_names_of_its_classes(arrays):
    part = load_cifar10("train", arrays.parent)  # labels 0 to 5
    assert part.label_names == CIFAR10_CLASSES
    assert [part.mask(c).argmax() for c in CIFAR10_CLASSES[:6]] == list(range(6))


def test_factors_choose_their_images(small_shapes):
    part = small_shapes[0]
    table = dict(zip(FACTORS, part.labels.T))
    assert part.label_names == tuple(FACTORS)
    for i, name in enumerate(SHAPE_NAMES):
        np.testing.assert_array_equal(part.mask("shape", name), table["shape"] == i)
        np.testing.assert_array_equal(part.mask("shape", i), table["shape"] == i)
    for name, (low, high) in list(FACTORS.items())[1:]:
        parts = [part.mask(name, edges) for edges in itertools.pairwise(np.linspace(low, high + 1e-6, 4))]
        assert (sum(p.astype(int) for p in parts) == 1).all() and all(p.any() for p in parts)  # thirds share no image
        assert table[name][parts[0]].max() < table[name][parts[1]].min()
    edge = float(table["hue"][0])  # the lower end belongs to a range, the upper does not
    assert part.mask("hue", (edge, 0.8))[0] and not part.mask("hue", (-0.1, edge))[0]


@pytest.mark.parametrize("arguments, words", [
    (("colour",), ("no factor 'colour'", *FACTORS)), (("shape",), ("never None", *SHAPE_NAMES)),
    (("shape", "ring"), ("never 'ring'", *SHAPE_NAMES, "0 to 2")), (("shape", 3), ("never 3", "cross")),
    (("shape", (0, 1)), ("never (0, 1)", "cross")), (("hue",), ("'hue'", "None", "range (low, high)", "0.0 to 0.75")),
    (("hue", 0.3), ("0.3", "range (low, high)")), (("hue", (0.5, 0.2)), ("(0.5, 0.2)", "range")),
    (("hue", ("a", "b")), ("range",)), (("size", (0.3, 0.3)), ("0.3 to 0.42",)),
    (("x", (1, 2, 3)), ("-0.08 to 0.08",))])
def test_labels_and_values_that_do_not_exist_are_refused(small_shapes, arguments, words):
    with complains(*words):
        small_shapes[0].mask(*arguments)


def test_images_without_labels_cannot_be_chosen():
    with complains("numbered has no labels", "shapes, cifar10, or CelebA"):
        numbered(3).mask("cat")


@pytest.fixture
def sparse(tmp_path):
    "CelebA-256 of 5.9 GB in files that take no disk: the root."
    folder, n = tmp_path / "celeba256", 30_000
    folder.mkdir()
    np.lib.format.open_memmap(folder / "train_images.npy", "w+", np.uint8, (n, 256, 256, 3))
    np.save(folder / "train_ids.npy", np.arange(140_000, 140_000 + n, dtype=np.int32))
    on_disk = (folder / "train_images.npy").stat().st_blocks * 512
    assert on_disk < 10**7, "this test needs a file system with sparse files"
    return tmp_path


def test_data_larger_than_memory_are_read_piece_by_piece(sparse):
    megabytes = 2**10 if sys.platform == "linux" else 2**20  # in the unit of ru_maxrss
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    part = load_celeba(256, "train", sparse)
    pieces = list(itertools.islice(part.first(20_000).batches(16), 10))
    batches = Batches(part, 16, seed=0, flip=True)
    seen = [batches(step, Draws(0, step))[0] for step in range(10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(part) == 22_771 and not batches.resident
    assert all(p.shape == (16, 3, 256, 256) and not p.any() for p in pieces) and all((x == -1).all() for x in seen)
    assert peak < 100 * 2**20, f"{peak:,} bytes"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * megabytes


# --- CIFAR-10 through torchvision -----------------------------------------------------------------------------------

def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server:
    "What answers instead of the network: `urlopen` of this object."

    def __init__(self, content):
        self.content, self.calls = content, 0

    def __call__(self, request, *args, **kwargs):
        self.calls += 1
        if isinstance(self.content, Exception):
            raise self.content
        response = io.BytesIO(self.content)
        response.url, response.length = request.full_url, len(self.content)
        return response


@pytest.fixture
def cifar10(monkeypatch):
    "A small archive in the official layout, whose checksums torchvision is told: (server, images and labels by split)."
    rng = np.random.default_rng(0)
    members, truth = {}, {"train": ([], []), "test": ([], [])}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        planes, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, 10, 4).tolist()
        members[name] = pickle.dumps({"data": planes, "labels": labels})
        images, classes = truth["test" if name == "test_batch" else "train"]
        images += [p.reshape(3, 32, 32).transpose(1, 2, 0) for p in planes]
        classes += labels
    members["batches.meta"] = pickle.dumps({"label_names": list(CIFAR10_CLASSES)})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(file.getvalue()))
    sums = [[name, md5(content)] for name, content in members.items()]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setitem(CIFAR10.meta, "md5", md5(members["batches.meta"]))
    server = Server(file.getvalue())
    monkeypatch.setattr(urllib.request, "urlopen", server)
    return server, {split: (np.stack(images), np.array(labels)) for split, (images, labels) in truth.items()}


def test_cifar10_is_downloaded_once_and_then_read_from_arrays(cifar10, tmp_path, monkeypatch):
    server, truth = cifar10
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "cache"))
    for split, (images, labels) in truth.items():
        part = load_data("cifar10", split)
        np.testing.assert_array_equal(part.images, images)
        np.testing.assert_array_equal(part.labels, labels)
        assert part.images.dtype == np.uint8 and (part.name, part.split) == ("cifar10", split)
    assert files_below(tmp_path / "cache" / "cifar10") == ARRAYS  # neither archive nor folders are left
    server.content, calls = urllib.error.URLError("no network"), server.calls
    load_data("cifar10", "train", subset=3)
    assert server.calls == calls


def test_without_a_network_the_user_is_told_what_to_do(cifar10, tmp_path):
    cifar10[0].content = urllib.error.URLError("Name or service not known")
    with complains(tmp_path / "cifar10", "Name or service not known", "check the network connection", *ARRAYS):
        load_cifar10("train", tmp_path)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_half_a_download_is_noticed_and_nothing_of_it_kept(cifar10, tmp_path, share):
    server, truth = cifar10
    whole = server.content
    server.content = whole[:int(share * len(whole))]
    with complains("CIFAR-10 could not be downloaded", tmp_path / "cifar10", "check the network connection"):
        prepare_cifar10(tmp_path)
    assert files_below(tmp_path) == []
    server.content = whole  # the next attempt starts afresh
    np.testing.assert_array_equal(load_cifar10("test", tmp_path).images, truth["test"][0])


def test_a_download_that_is_interrupted_leaves_nothing(cifar10, tmp_path):
    class Stop(Server):
        def __call__(self, request):
            raise KeyboardInterrupt
    urllib.request.urlopen = Stop(b"")  # the fixture puts the real one back
    with pytest.raises(KeyboardInterrupt):
        prepare_cifar10(tmp_path)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("where", ["save", "replace"])
@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_disk_that_is_full_leaves_only_whole_arrays(cifar10, tmp_path, monkeypatch, where, written):
    module, real = (np, np.save) if where == "save" else (core.os, core.os.replace)
    calls = []

    def limited(*args):
        calls.append(args)
        return real(*args) if len(calls) <= written else disk_full()
    monkeypatch.setattr(module, where, limited)
    with complains(tmp_path / "cifar10", ".npy", "No space left", "free some disk space"):
        prepare_cifar10(tmp_path)
    left = files_below(tmp_path / "cifar10")
    assert len(left) == written and set(left) < set(ARRAYS)
    monkeypatch.setattr(module, where, real)
    for split, (images, labels) in cifar10[1].items():  # and the next attempt completes them
        part = load_cifar10(split, tmp_path)
        np.testing.assert_array_equal(part.images, images)
        np.testing.assert_array_equal(part.labels, labels)


def test_a_data_folder_that_cannot_be_written_is_named(cifar10, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "file"))
    with complains(tmp_path / "file", "set HYBRIDVAE_DATA to a folder that can be written"):
        load_data("cifar10")
    monkeypatch.setattr(data.tempfile, "TemporaryDirectory", disk_full)
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "full"))
    with complains(tmp_path / "full", "No space left"):
        load_data("cifar10")
    assert cifar10[0].calls == 0 and files_below(tmp_path) == ["file", "full", "full/cifar10"]


# --- CIFAR-10 from arrays -------------------------------------------------------------------------------------------

@pytest.fixture
def arrays(tmp_path, monkeypatch):
    "A cache with the four arrays and no network: the folder."
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for split, n in (("train", 6), ("test", 4)):
        np.save(folder / f"{split}_images.npy", np.full((n, 32, 32, 3), n, np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(n, dtype=np.uint8))
    monkeypatch.setattr(urllib.request, "urlopen", Server(urllib.error.URLError("no network")))
    return folder


def test_arrays_in_the_cache_are_all_that_is_needed(arrays):
    for split, n in (("train", 6), ("test", 4)):
        part = load_cifar10(split, arrays.parent)
        assert len(part) == n and (part.images == n).all() and part.labels.tolist() == list(range(n))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def save(array):
    return lambda path: np.save(path, array, allow_pickle=True)


def images(*shape, dtype=np.uint8):
    return save(np.zeros(shape, dtype))


FAULTS = {
    "half a file": ("train_images.npy", cut, "not a whole .npy file"),
    "half a header": ("train_images.npy", lambda p: p.write_bytes(p.read_bytes()[:20]), "not a whole .npy file"),
    "empty file": ("train_labels.npy", lambda p: p.write_bytes(b""), "not a whole .npy file"),
    "no array": ("train_images.npy", lambda p: p.write_text("hello"), "not a whole .npy file"),
    "objects": ("train_labels.npy", save(np.array([{}] * 6)), "not a whole .npy file"),
    "channels first": ("train_images.npy", images(6, 3, 32, 32), "(6, 3, 32, 32), but uint8 of shape N x 32 x 32 x 3"),
    "other size": ("train_images.npy", images(6, 64, 64, 3), "N x 32 x 32 x 3"),
    "too few axes": ("train_images.npy", images(6, 3072), "N x 32 x 32 x 3"),
    "no images": ("train_images.npy", images(0, 32, 32, 3), "N x 32 x 32 x 3"),
    "floats": ("train_images.npy", images(6, 32, 32, 3, dtype=np.float32), "holds float32"),
    "wide labels": ("train_labels.npy", images(6, dtype=np.int64), "holds int64"),
    "two axes of labels": ("train_labels.npy", images(6, 1), "of shape (6, 1), but uint8 of shape N"),
    "a class too many": ("train_labels.npy", save(np.array([0, 1, 2, 3, 4, 10], np.uint8)),
                         "0 to 10, but 0 to 9 are allowed"),
}


@pytest.mark.parametrize("name, damage, words", FAULTS.values(), ids=FAULTS)
def test_a_damaged_array_is_named_with_its_remedy(arrays, name, damage, words):
    damage(arrays / name)
    with complains(arrays / name, words, "remove it and prepare the data set again"):
        load_cifar10("train", arrays.parent)
    assert files_below(arrays) == ARRAYS


def test_counts_that_differ_are_named(arrays):
    np.save(arrays / "train_labels.npy", np.zeros(5, np.uint8))
    with complains(arrays, "6 train images but 5 labels", "remove both files"):
        load_cifar10("train", arrays.parent)


def test_one_array_that_is_missing_is_not_made_up(arrays):
    (arrays / "train_labels.npy").unlink()
    with complains(arrays, "check the network connection", "train_labels.npy"):
        load_cifar10("test", arrays.parent)
    assert files_below(arrays) == [n for n in ARRAYS if n != "train_labels.npy"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HYBRIDVAE_DATA", raising=False)
    assert data.data_root() == tmp_path / "hybridvae"
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "mine"))
    assert data.data_root() == tmp_path / "mine"


# --- batches --------------------------------------------------------------------------------------------------------

def numbered(n, size=4):
    "n images, all different and none symmetric, whose label is their number."
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return ImageData("numbered", "train", pixels, np.arange(n))


@pytest.mark.parametrize("n, batch", [(12, 4), (10, 4), (7, 6), (5, 8)])  # also batches over the end of an epoch
def test_each_epoch_is_a_new_permutation(n, batch):
    batches, epochs = Batches(numbered(n), batch, seed=0), 4
    seen = torch.cat([batches.indices(step) for step in range(-(-n * epochs // batch))])[:n * epochs].reshape(epochs, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == epochs


def test_any_step_can_be_asked_for_in_any_order():
    forwards, backwards = Batches(numbered(10), 4, seed=3), Batches(numbered(10), 4, seed=3)
    want = [forwards.indices(step).tolist() for step in range(20)]
    assert [backwards.indices(step).tolist() for step in reversed(range(20))] == want[::-1]
    assert Batches(numbered(10), 4, seed=3).indices(17).tolist() == want[17]
    assert [Batches(numbered(10), 4, seed=4).indices(step).tolist() for step in range(20)] != want


def test_a_batch_holds_the_images_and_labels_of_its_indices():
    few = numbered(10)
    batches = Batches(few, 4, seed=0)
    x, y = batches(1, Draws(0, 1))
    assert torch.equal(y, batches.indices(1))
    assert torch.equal(x, to_float(torch.from_numpy(few.images[y.numpy()])))


@pytest.mark.parametrize("owners", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]])
def test_the_parts_of_all_processes_are_the_whole_batch(owners):
    few = numbered(10)
    whole = Batches(few, 8, seed=0, flip=True, n_slices=4, slices=(0, 1, 2, 3))
    parts = [Batches(few, 8, seed=0, flip=True, n_slices=4, slices=s) for s in owners]
    for step in range(5):
        x, y = whole(step, Draws(0, step, (0, 1, 2, 3)))
        pieces = [part(step, Draws(0, step, s)) for part, s in zip(parts, owners)]
        assert torch.equal(x, torch.cat([p[0] for p in pieces])) and torch.equal(y, torch.cat([p[1] for p in pieces]))


def test_flipped_images_are_exact_mirror_images_and_half_of_all():
    few, steps = numbered(10), 100
    plain, flipped, mirrored = Batches(few, 8, seed=0), Batches(few, 8, seed=0, flip=True), 0
    for step in range(steps):
        x, y = flipped(step, Draws(0, step))
        original, same = plain(step, Draws(0, step))
        assert torch.equal(y, same)
        is_mirrored = (x == original.flip(-1)).all(dim=(1, 2, 3))
        assert (is_mirrored ^ (x == original).all(dim=(1, 2, 3))).all()  # one or the other, never both
        mirrored += is_mirrored.sum().item()
    assert abs(mirrored / (8 * steps) - 0.5) < 5 * 0.5 / np.sqrt(8 * steps)


def test_a_batch_that_does_not_divide_into_slices_is_refused():
    with complains("a batch of 10 images", "4 slices", "multiple of 4"):
        Batches(numbered(4), 10, seed=0, n_slices=4, slices=(0,))


def test_images_without_labels_make_batches_without_labels():
    few = numbered(4)
    assert Batches(ImageData("x", "train", few.images), 2, seed=0)(0, Draws(0, 0))[1] is None


# --- batches of data that are not on the device ---------------------------------------------------------------------

def mapped(data, tmp_path):
    "The same data in a file."
    np.save(tmp_path / "mapped.npy", data.images)
    return ImageData(data.name, data.split, np.load(tmp_path / "mapped.npy", mmap_mode="r"), data.labels)


@pytest.mark.parametrize("resident", [None, True, False])
@pytest.mark.parametrize("stored", [lambda data, _: data, mapped], ids=["memory", "mapped"])
def test_batches_are_the_same_wherever_the_images_lie(tmp_path, stored, resident):
    data = numbered(1_500)  # more than are copied to a device at a time
    other = Batches(stored(data, tmp_path), 64, 0, True, 4, (1, 3), resident=resident)
    rows = torch.from_numpy(data.images)
    for step in (0, 1, 30):
        draws = [Draws(0, step, (1, 3)) for _ in range(2)]
        x, y = other(step, draws[0])
        flipped = draws[1].rand(32) < 0.5  # what the definition says, image by image
        want = torch.stack([to_float(rows[i:i + 1])[0].flip(-1) if f else to_float(rows[i:i + 1])[0]
                            for i, f in zip(other.indices(step), flipped)])
        assert torch.equal(x, want) and torch.equal(y, other.indices(step))
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_memory_map_stays_one_on_the_cpu_and_fills_half_of_a_gpu_at_most(tmp_path, monkeypatch):
    few = numbered(10)
    file, n = mapped(few, tmp_path), few.images.nbytes
    assert Batches(few, 2, 0).resident and not Batches(file, 2, 0).resident
    assert np.shares_memory(Batches(file, 2, 0).rows.images, file.images)
    for free, fits in ((2 * n, True), (2 * n - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 100 * n))
        assert all(data._fits(d.images, torch.device("cuda")) == fits for d in (few, file))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_gets_the_batches_of_the_cpu(tmp_path, resident):
    few = numbered(2_000)
    there = Batches(mapped(few, tmp_path), 64, 0, device="cuda", resident=resident)
    here = Batches(few, 64, 0)
    for step in range(50):
        (x, y), (want, labels) = there(step, Draws(0, step, device="cuda")), here(step, Draws(0, step))
        assert x.device.type == y.device.type == "cuda"
        assert torch.allclose(x.cpu(), want, atol=1e-6) and torch.equal(y.cpu(), labels)
