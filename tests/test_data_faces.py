"""Image files into arrays: CelebA from the official archive or files, and any folder of images."""
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import complains, disk_full, files_below
from hybridvae import data
from hybridvae.data import load_celeba, load_data, load_folder, prepare_celeba, prepare_folder, prepared_names
from PIL import Image
from torchvision.datasets import CelebA

NUMBERS = [1, 2, 3, 58, 999, 162_769, 162_770, 162_771, 182_637, 182_638, 202_598, 202_599]
TRAIN, TEST = NUMBERS[:7], NUMBERS[7:]  # the official training part ends with 162770
ATTRIBUTES = [f"Attribute_{i}" for i in range(38)] + ["Smiling", "Young"]
ARRAYS = ["attribute_names.json", "train_attributes.npy", "train_ids.npy", "train_images.npy"]


# --- CelebA ---------------------------------------------------------------------------------------------------------

def signs(number):
    "40 made-up attributes, -1 or 1."
    return np.random.default_rng(number).choice([-1, 1], 40)


def face(number):
    "A made-up aligned image: smooth, different for every number."
    down, right = np.mgrid[:218, :178]
    return Image.fromarray(np.stack([right, down, np.full_like(down, number % 251)], axis=-1).astype(np.uint8))


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def table(rows, *header):
    lines = (f"{n:06d}.jpg " + " ".join(f"{v:2d}" for v in values) for n, values in rows)
    return "\n".join([*header, *lines]).encode() + b"\n"


def official(images=None):
    "The official files by name: `img_align_celeba.zip` and the lists, laid out as in the original."
    images = images or {f"{n:06d}.jpg": jpeg(face(n)) for n in NUMBERS}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in images.items():
            archive.writestr(f"img_align_celeba/{name}", content)
    count = str(len(NUMBERS))
    parts = [0 if n <= 162_770 else 1 if n <= 182_637 else 2 for n in NUMBERS]
    return {
        "img_align_celeba.zip": file.getvalue(),
        "list_attr_celeba.txt": table(((n, signs(n)) for n in NUMBERS), count, " ".join(ATTRIBUTES) + " "),
        "identity_CelebA.txt": table((n, [n % 7]) for n in NUMBERS),
        "list_bbox_celeba.txt": table(((n, [1, 2, 3, 4]) for n in NUMBERS), count, "image_id x_1 y_1 width height"),
        "list_landmarks_align_celeba.txt": table(((n, range(10)) for n in NUMBERS), count, "lefteye_x lefteye_y"),
        "list_eval_partition.txt": table((n, [p]) for n, p in zip(NUMBERS, parts)),
    }


class Drive:
    "What answers instead of Google Drive, in place of the package gdown."

    def __init__(self, files):
        self.files, self.calls = files, 0

    def download(self, id, output, **kwargs):
        self.calls += 1
        content = self.files[Path(output).name]
        if isinstance(content, BaseException):
            raise content
        Path(output).write_bytes(content)


def serve(monkeypatch, files):
    "Let torchvision find these files on the network, with the checksums that they have."
    drive = Drive(dict(files))
    sums = [("id", hashlib.md5(content, usedforsecurity=False).hexdigest(), name) for name, content in files.items()]
    monkeypatch.setattr(CelebA, "file_list", sums)
    monkeypatch.setitem(sys.modules, "gdown", drive)
    return drive


@pytest.fixture
def drive(monkeypatch):
    return serve(monkeypatch, official())


@pytest.fixture
def source(tmp_path, monkeypatch):
    "The official files on disk and no network: the folder that holds `celeba`."
    monkeypatch.setitem(sys.modules, "gdown", None)
    folder = tmp_path / "official" / "celeba"
    folder.mkdir(parents=True)
    for name, content in official().items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
        archive.extractall(folder)
    return folder.parent


def check(root, attributes=True):
    "The two parts of a cache made from the official files."
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        part = load_celeba(64, split, root)
        assert part.ids.tolist() == numbers and part.images.shape == (len(numbers), 64, 64, 3)
        colours = part.images[:, 20:40, 20:40, 2].mean(axis=(1, 2))  # which image it is, through JPEG
        assert abs(colours - np.array(numbers) % 251).max() < 3
        if attributes:
            np.testing.assert_array_equal(part.labels, [signs(n) == 1 for n in numbers])
            assert part.labels.dtype == np.uint8 and part.label_names == tuple(ATTRIBUTES)
        else:
            assert part.labels is None and part.label_names == ()


def test_celeba_is_downloaded_once_and_then_read_from_arrays(drive, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path))
    assert len(load_data("celeba64")) == len(TRAIN)
    check(tmp_path)
    assert files_below(tmp_path / "celeba64") == ARRAYS  # neither archive nor folders are left
    assert drive.calls == 6


def test_the_crop_is_the_middle_and_is_antialiased(source, tmp_path):
    prepare_celeba(64, tmp_path, source=source)
    image = load_celeba(64, "train", tmp_path).images[0].astype(float)
    middle = (np.arange(64) + 0.5) * 148 / 64 - 0.5  # of the new pixels, in pixels of the square
    # red counts the columns of the original, green its rows
    for seen, first in ((image[32, :, 0], 15), (image[:, 32, 1], 35)):
        error = seen - (first + middle)
        assert abs(error.mean()) < 0.2 and abs(error).max() < 3
    stripes = np.zeros((218, 178, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert abs(data.crop_celeba(tmp_path / "stripes.png", 64).astype(float) - 127.5).max() < 16  # not 0 and 255


def test_celeba_256_is_enlarged_and_says_so(source, tmp_path):
    prepare_celeba(256, tmp_path, source=source)
    part = load_celeba(256, "test", tmp_path)
    assert part.images.shape == (5, 256, 256, 3) and part.name == "celeba256"
    for words in ("CelebA-256, 5 held-out of 202,599 images (12-image subset)", "148 of 178 pixels", "antialiasing",
                  "enlarged from 148 to 256 pixels", "not CelebA-HQ"):
        assert words in part.description
    error = part.images[0][128, :, 0] - (15 + (np.arange(256) + 0.5) * 148 / 256 - 0.5)
    assert abs(error.mean()) < 0.2 and abs(error).max() < 3


def test_official_files_on_disk_need_no_download(source, tmp_path):
    before = files_below(source)
    assert prepare_celeba(64, tmp_path, source=source) == tmp_path / "celeba64"
    check(tmp_path)
    assert files_below(source) == before and files_below(tmp_path / "celeba64") == ARRAYS


def test_without_the_attribute_file_there_are_no_labels_until_it_is_given(source, tmp_path):
    attributes = source / "celeba" / "list_attr_celeba.txt"
    attributes.rename(tmp_path / "elsewhere")
    prepare_celeba(64, tmp_path, source=source)
    check(tmp_path, attributes=False)
    with complains("celeba64 has no labels", "attribute file"):
        load_celeba(64, "train", tmp_path).mask("Smiling")
    (tmp_path / "elsewhere").rename(attributes)
    images = (tmp_path / "celeba64" / "train_images.npy").stat()
    prepare_celeba(64, tmp_path, source=source)
    check(tmp_path)
    assert (tmp_path / "celeba64" / "train_images.npy").stat().st_mtime_ns == images.st_mtime_ns


def test_an_attribute_chooses_its_images(source, tmp_path):
    prepare_celeba(64, tmp_path, source=source)
    part = load_celeba(64, "train", tmp_path)
    assert part.mask("Smiling").tolist() == [bool(signs(n)[38] == 1) for n in TRAIN]
    assert part.first(3).mask("Young").tolist() == [bool(signs(n)[39] == 1) for n in TRAIN[:3]]
    with complains("celeba64 has no attribute 'Frowning'", "Attribute_0", "Smiling"):
        part.mask("Frowning")
    with complains("the attribute 'Smiling' takes no value", "True"):
        part.mask("Smiling", True)


class Unreachable(Exception):
    "As gdown raises: no kind of RuntimeError or OSError, and of several lines."


@pytest.mark.parametrize("error", [Unreachable("Cannot retrieve the link.\n\n\tTry a browser"),
                                   OSError("no route to host")])
def test_without_a_network_the_user_is_told_what_to_do(drive, tmp_path, error):
    drive.files["img_align_celeba.zip"] = error
    with complains("CelebA could not be downloaded", tmp_path / "celeba64", str(error).split()[0],
                   "check the network connection",
                   "source=", "train_images.npy and train_ids.npy"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


def test_the_package_that_downloads_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with complains("pip install gdown", "source=", tmp_path / "celeba64"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


def test_no_download_where_none_is_wanted(drive, tmp_path):
    with complains("CelebA could not be downloaded", "source="):
        prepare_celeba(64, tmp_path, download=False)
    assert drive.calls == 0 and files_below(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_half_a_download_is_noticed_and_nothing_of_it_kept(drive, tmp_path, share):
    whole = drive.files["img_align_celeba.zip"]
    drive.files["img_align_celeba.zip"] = whole[:int(share * len(whole))]
    with complains("CelebA could not be downloaded", "corrupted"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []
    drive.files["img_align_celeba.zip"] = whole  # the next attempt starts afresh
    prepare_celeba(64, tmp_path)
    check(tmp_path)


def test_an_archive_that_is_none_is_named(monkeypatch, tmp_path):
    serve(monkeypatch, official() | {"img_align_celeba.zip": b"no archive"})
    with complains("CelebA could not be downloaded", "not a zip file"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


def test_a_download_that_is_interrupted_leaves_nothing(drive, tmp_path):
    drive.files["list_bbox_celeba.txt"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


def test_a_disk_that_is_full_during_the_download_is_named(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "extractall", disk_full)
    with complains("the disk of", tmp_path / "celeba64", "full", "set HYBRIDVAE_DATA to another folder"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


class files_no_larger_than:
    "A stand-in for a full disk: within the block writing fails for good once a file has so many bytes."

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize("size", [0, 100, 50_000, 12 * 64 * 64 * 3])  # in the header, in an image, in the last one
def test_writing_that_fails_half_way_leaves_nothing(source, tmp_path, size):
    with complains(tmp_path / "celeba64" / "train_images.npy", "could not be written", "free some disk space"):
        with files_no_larger_than(size):
            prepare_celeba(64, tmp_path, source=source)
    assert files_below(tmp_path / "celeba64") == []
    prepare_celeba(64, tmp_path, source=source)
    check(tmp_path)


@pytest.mark.parametrize("written", [0, 1])
def test_a_disk_that_is_full_at_the_end_leaves_only_whole_arrays(source, tmp_path, monkeypatch, written):
    calls, save = [], np.save

    def limited(*args):
        calls.append(args)
        return save(*args) if len(calls) <= written else disk_full()
    monkeypatch.setattr(np, "save", limited)
    with complains(tmp_path / "celeba64", "No space left"):
        prepare_celeba(64, tmp_path, source=source)
    assert set(files_below(tmp_path / "celeba64")) <= set(ARRAYS) - {"train_images.npy"}
    monkeypatch.setattr(np, "save", save)
    prepare_celeba(64, tmp_path, source=source)
    check(tmp_path)


BROKEN = {"truncated": (lambda whole: whole[:len(whole) // 2], "truncated"),
          "empty": (lambda whole: b"", "cannot identify"),
          "text": (lambda whole: b"hello", "cannot identify"),
          "of another size": (lambda whole: jpeg(Image.new("RGB", (409, 687))),
                              "409 x 687 pixels instead of 178 x 218")}


@pytest.mark.parametrize("damage, words", BROKEN.values(), ids=BROKEN)
def test_an_unreadable_image_in_the_archive_is_named(monkeypatch, tmp_path, damage, words):
    images = {f"{n:06d}.jpg": jpeg(face(n)) for n in NUMBERS}
    for name in ("000058.jpg", "202599.jpg"):
        images[name] = damage(images[name])
    serve(monkeypatch, official(images))
    with complains("2 of 12 images", "img_align_celeba/000058.jpg", words, "get the official archive again"):
        prepare_celeba(64, tmp_path)
    assert files_below(tmp_path) == []


def test_a_source_without_official_images_is_refused(source, tmp_path):
    folder = tmp_path / "nowhere" / "celeba" / "img_align_celeba"
    with complains(folder, "no .jpg files", "img_align_celeba/000001.jpg"):
        prepare_celeba(64, tmp_path, source=tmp_path / "nowhere")
    images = source / "celeba" / "img_align_celeba"
    shutil.copy(images / "000001.jpg", images / "me.jpg")
    with complains("img_align_celeba/me.jpg", "no official CelebA number", "000001 to 202599", "prepare_folder"):
        prepare_celeba(64, tmp_path, source=source)
    with complains("64 or 256 pixels, not 128", "prepare_folder"):
        prepare_celeba(128, tmp_path, source=source)
    assert not (tmp_path / "celeba64").exists()


ATTRIBUTE_FAULTS = {
    "a row is missing": lambda text: text.replace("000058.jpg", "000059.jpg"),
    "a value is neither": lambda text: text.replace(" 1", " 2", 1),
    "a value is a word": lambda text: text.replace(" 1", " x", 1),
    "cut short": lambda text: text[:len(text) // 2],
    "empty": lambda text: "",
    "another table": lambda text: "1\na b\n000001.jpg 1 -1\n",
}


@pytest.mark.parametrize("damage", ATTRIBUTE_FAULTS.values(), ids=ATTRIBUTE_FAULTS)
def test_a_damaged_attribute_file_is_named(source, tmp_path, damage):
    path = source / "celeba" / "list_attr_celeba.txt"
    path.write_text(damage(path.read_text()))
    with complains(path, "40 attributes of each of the 12 images"):
        prepare_celeba(64, tmp_path, source=source)
    assert files_below(tmp_path / "celeba64") == []


@pytest.fixture
def faces(tmp_path, monkeypatch):
    "A cache with images and numbers only, as plain arrays, and no network: its root."
    monkeypatch.setitem(sys.modules, "gdown", None)
    folder = tmp_path / "celeba64"
    folder.mkdir()
    pixels = np.empty((12, 64, 64, 3), np.uint8)
    pixels[:] = np.arange(12, dtype=np.uint8)[:, None, None, None]
    np.save(folder / "train_images.npy", pixels)
    np.save(folder / "train_ids.npy", np.array(NUMBERS, np.int32))
    return tmp_path


def test_arrays_of_images_and_numbers_are_all_that_is_needed(faces):
    train, test = load_celeba(64, "train", faces), load_celeba(64, "test", faces)
    assert train.images[:, 0, 0, 0].tolist() == list(range(7))
    assert test.images[:, 0, 0, 0].tolist() == list(range(7, 12))
    assert (train.ids.tolist(), test.ids.tolist()) == (TRAIN, TEST) and train.labels is None
    assert train.description.startswith("CelebA-64, 7 of 202,599 images (12-image subset): "
                                        "centre crop of 148 of 178 pixels")
    assert "HQ" not in train.description


def test_the_whole_of_celeba_is_not_called_a_subset(faces, monkeypatch):
    monkeypatch.setattr(data, "CELEBA_IMAGES", 12)
    monkeypatch.setattr(data, "CELEBA_LAST_TRAIN", 7)
    np.save(faces / "celeba64" / "train_ids.npy", np.arange(1, 13, dtype=np.int32))
    part = load_celeba(64, "train", faces)
    assert len(part) == 7 and part.description.startswith("CelebA-64, 7 of 12 images: centre crop")


def test_numbers_in_any_order_choose_the_same_images(faces):
    order = np.random.default_rng(0).permutation(12)
    for name in ("train_images.npy", "train_ids.npy"):
        np.save(faces / "celeba64" / name, np.load(faces / "celeba64" / name)[order])
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        part = load_celeba(64, split, faces)
        assert part.ids.tolist() == [n for n in np.array(NUMBERS)[order] if n in numbers]
        assert [NUMBERS[i] for i in part.images[:, 0, 0, 0]] == part.ids.tolist()


def test_large_arrays_stay_in_their_file(faces, monkeypatch):
    monkeypatch.setattr(data, "MAP_ABOVE", 12 * 64 * 64 * 3 - 1)
    for split, n in (("train", 7), ("test", 5)):
        part = load_celeba(64, split, faces)
        assert isinstance(part.images, np.memmap) and len(part) == n and not part.images.flags.writeable
    monkeypatch.setattr(data, "MAP_ABOVE", 12 * 64 * 64 * 3)
    assert not isinstance(load_celeba(64, "train", faces).images, np.memmap)
    monkeypatch.setattr(data, "MAP_ABOVE", 0)
    np.save(faces / "celeba64" / "train_ids.npy", np.array(NUMBERS[::-1], np.int32))
    with complains("train_ids.npy", "not in ascending order", "remove its files"):
        load_celeba(64, "train", faces)


def ids(*numbers, dtype=np.int32):
    return np.array(numbers, dtype)


FACE_FAULTS = {
    "too few numbers": ("train_ids.npy", ids(*NUMBERS[:-1]), ("12 images but 11 different official numbers",)),
    "a number twice": ("train_ids.npy", ids(*NUMBERS[:-1], 1), ("12 images but 11 different official numbers",)),
    "a number too large": ("train_ids.npy", ids(*NUMBERS[:-1], 202_600), ("202600", "1 to 202599 are allowed")),
    "numbers as floats": ("train_ids.npy", ids(*NUMBERS, dtype=np.float64), ("holds float64", "int32 of shape N")),
    "other size": ("train_images.npy", np.zeros((12, 32, 32, 3), np.uint8), ("N x 64 x 64 x 3",)),
    "attributes of others": ("train_attributes.npy", np.zeros((11, 40), np.uint8), ("12 x 40",)),
    "attributes of -1 and 1": ("train_attributes.npy", np.full((12, 40), 255, np.uint8), ("0 to 1 are allowed",)),
    "attributes without names": ("train_attributes.npy", np.zeros((12, 40), np.uint8),
                                 ("attribute_names.json", "40 names")),
}


@pytest.mark.parametrize("name, array, words", FACE_FAULTS.values(), ids=FACE_FAULTS)
def test_damaged_arrays_are_named_with_their_remedy(faces, name, array, words):
    np.save(faces / "celeba64" / name, array)
    with complains(faces / "celeba64", "remove", "prepare the data set again", *words):
        load_celeba(64, "train", faces)


@pytest.mark.parametrize("content", ["", "[1, 2", '["a"]', "7", "null"])
def test_damaged_attribute_names_are_named(faces, content):
    np.save(faces / "celeba64" / "train_attributes.npy", np.zeros((12, 40), np.uint8))
    (faces / "celeba64" / "attribute_names.json").write_text(content)
    with complains(faces / "celeba64" / "attribute_names.json", "not a list of 40 names"):
        load_celeba(64, "train", faces)


@pytest.mark.parametrize("split, numbers, words", [("test", TRAIN, "above 162770"), ("train", TEST, "up to 162770")])
def test_a_part_without_images_is_named(faces, split, numbers, words):
    np.save(faces / "celeba64" / "train_images.npy", np.zeros((len(numbers), 64, 64, 3), np.uint8))
    np.save(faces / "celeba64" / "train_ids.npy", np.array(numbers, np.int32))
    with complains(faces / "celeba64", words, f"'{split}'"):
        load_celeba(64, split, faces)


def test_images_are_converted_without_being_in_memory_together(tmp_path):
    n, image = 3_000, np.zeros((64, 64, 3), np.uint8)
    tracemalloc.start()
    files = [Path(str(i)) for i in range(n)]
    failed = data._write_images(tmp_path / "x.npy", files, lambda file: image + int(file.name) % 256, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert failed == [] and peak < n * image.size / 6, f"{peak:,} bytes for an array of {n * image.size:,}"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[:, 5, 6, 1], np.arange(n) % 256)  # and in order


# --- any folder -----------------------------------------------------------------------------------------------------

def picture(number, width=40, height=32):
    return Image.new("RGB", (width, height), (number, 2 * number, 255 - number))


@pytest.fixture
def album(tmp_path):
    "21 plain pictures in two folders, whose red is their number in the order of paths; beside them other files."
    folder = tmp_path / "album"
    (folder / "b" / "c").mkdir(parents=True)
    for i in range(21):
        picture(i).save(folder / (f"a{i:02d}.png" if i < 12 else f"b/c/{i}.PNG"))
    (folder / "notes.txt").write_text("not an image")
    (folder / "b" / ".hidden.png").write_text("not an image either")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "small.png").write_text("nor this")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def reds(part):
    return part.images[:, 0, 0, 0].tolist()


def test_a_folder_becomes_a_data_set(album, root):
    before = files_below(album)
    assert prepare_folder(album, "my-album_1", 32) == root / "my-album_1"
    train, test = load_data("my-album_1"), load_data("my-album_1", "test")
    assert reds(test) == [9, 19] and reds(train) == [i for i in range(21) if i not in (9, 19)]
    for part, split in ((train, "train"), (test, "test")):
        assert (part.name, part.split, part.labels, part.image_size) == ("my-album_1", split, None, 32)
        assert part.images.dtype == np.uint8 and (part.images[..., 1] == 2 * part.images[..., 0]).all()
    assert train.description == "my-album_1, 19 images: central square, resized with antialiasing"
    assert test.description.startswith("my-album_1, 2 held-out images")
    assert prepared_names() == ["my-album_1"] and files_below(album) == before
    assert len(load_data("my-album_1", "train", 5)) == 5


@pytest.mark.parametrize("heldout, test", [(0.5, [1, 3, 5]), (0.34, [2, 5]), (0.2, [4]), (0.1, [5]), (0.01, [5])])
def test_every_kth_image_is_held_out_and_always_one(album, root, heldout, test):
    for path in album.rglob("*.PNG"):
        path.unlink()
    for i in range(6, 12):
        (album / f"a{i:02d}.png").unlink()
    prepare_folder(album, "few", 32, heldout=heldout)
    assert reds(load_data("few", "test")) == test
    assert reds(load_data("few")) == [i for i in range(6) if i not in test]


def test_the_home_folder_may_be_written_as_a_tilde(album, root, monkeypatch, source):
    monkeypatch.setenv("HOME", str(album.parent))
    prepare_folder("~/album", "home", 32)
    prepare_celeba(64, root, source="~/official")
    assert prepared_names() == ["home"] and len(load_data("celeba64")) == len(TRAIN)


def test_two_images_are_enough(album, root):
    for path in [*album.rglob("*.PNG"), *album.glob("a?[2-9].png"), *album.glob("a1*.png")]:
        path.unlink()
    prepare_folder(album, "pair", 32)
    assert (reds(load_data("pair")), reds(load_data("pair", "test"))) == ([0], [1])
    (album / "a00.png").unlink()
    with complains(album, "holds 1 image,", "at least two", ".png"):
        prepare_folder(album, "one", 32)


def loaded(folder, name, root, size=16):
    "The picture of that name, prepared beside another."
    picture(200).save(folder / "zzz.png")
    prepare_folder(folder, name, size, root)
    return load_folder(name, "train", root).images[0].astype(int)


def test_the_central_square_is_taken(tmp_path):
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("lime", (32, 0, 64, 32))
    for name, image in (("wide", wide), ("high", wide.transpose(Image.Transpose.ROTATE_90))):
        (tmp_path / name / "src").mkdir(parents=True)
        image.save(tmp_path / name / "src" / "a.png")
        assert (loaded(tmp_path / name / "src", name, tmp_path / "cache", 32) == (0, 255, 0)).all()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4], stripes[:, 1::4] = 255, 255
    (tmp_path / "src").mkdir()
    Image.fromarray(stripes).save(tmp_path / "src" / "a.png")
    # every fourth pixel would be white
    assert abs(loaded(tmp_path / "src", "stripes", tmp_path) - 127.5)[:, 2:-2].max() < 4


def noise(size, dtype):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)


def palette_with_a_hole():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 255, 255, 128, 0])
    image.paste(0, (0, 0, 8, 16))
    image.info["transparency"] = 0
    return image


half = np.zeros((16, 16, 4), np.uint8)
half[:, :, 0], half[:, :8, 3], half[:, 8:, 3] = 255, 255, 51  # red: opaque on the left, a fifth of it on the right
deep = np.repeat(np.array([[0], [257 * 64], [257 * 200], [65_535]], np.uint16), 16, axis=1).repeat(4, axis=0)
KINDS = {
    "grey.png": (Image.new("L", (16, 16), 77), {(0, 0): (77, 77, 77)}),
    "black and white.bmp": (Image.new("1", (16, 16), 1), {(0, 0): (255, 255, 255)}),
    "palette.gif": (Image.new("RGB", (16, 16), (10, 200, 30)).quantize(4), {(3, 3): (10, 200, 30)}),
    "hole.png": (palette_with_a_hole(), {(8, 4): (255, 255, 255), (8, 12): (255, 128, 0)}),
    "alpha.png": (Image.fromarray(half), {(8, 0): (255, 0, 0), (8, 15): (255, 204, 204)}),
    "alpha.webp": (Image.fromarray(half), {(8, 15): (255, 204, 204)}),
    "grey and alpha.png": (Image.new("LA", (16, 16), (0, 0)), {(5, 5): (255, 255, 255)}),
    "16 bits.png": (Image.fromarray(deep),
                    {(0, 0): (0,) * 3, (4, 3): (64,) * 3, (8, 9): (200,) * 3, (15, 0): (255,) * 3}),
    "16 bits.tif": (Image.fromarray(deep), {(4, 3): (64,) * 3, (15, 0): (255,) * 3}),
    "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {(5, 5): (255, 0, 0)}),
    "plain.jpeg": (Image.new("RGB", (16, 16), (200, 100, 50)), {(5, 5): (200, 100, 50)}),
    "plain.tiff": (Image.new("RGB", (16, 16), (200, 100, 50)), {(5, 5): (200, 100, 50)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    image, pixels = KINDS[name]
    (tmp_path / "src").mkdir()
    image.save(tmp_path / "src" / name, **({"lossless": True} if name.endswith("webp") else {}))
    found = loaded(tmp_path / "src", "kind", tmp_path)
    for (row, column), colour in pixels.items():
        assert abs(found[row, column] - colour).max() <= 3, (row, column)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    (tmp_path / "src").mkdir()
    red, blue = (Image.new("RGB", (16, 16), c) for c in ("red", "blue"))
    red.save(tmp_path / "src" / "a.gif", save_all=True, append_images=[blue])
    assert (loaded(tmp_path / "src", "film", tmp_path) == (255, 0, 0)).all()


def test_photographs_are_turned_upright(tmp_path):
    (tmp_path / "src").mkdir()
    lying = Image.new("RGB", (16, 16), "blue")
    lying.paste("red", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what is on the left belongs on top
    lying.save(tmp_path / "src" / "a.png", exif=exif)
    upright = loaded(tmp_path / "src", "upright", tmp_path)
    assert (upright[:8] == (255, 0, 0)).all() and (upright[8:] == (0, 0, 255)).all()


def test_the_same_folder_again_is_no_work_and_another_is_refused(album, root):
    folder = prepare_folder(album, "album", 32)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare_folder(album, "album", 32) == folder
    moved = shutil.copytree(album, album.parent / "moved")
    assert prepare_folder(moved, "album", 32) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    taken = (folder, "other content", "choose another name, or remove")
    for arguments in ({"image_size": 24}, {"image_size": 32, "heldout": 0.2}):
        with complains(*taken):
            prepare_folder(album, "album", **arguments)
    picture(99).save(album / "a05.png")  # of the same name and size
    with complains(*taken):
        prepare_folder(album, "album", 32)
    (moved / "a05.png").rename(moved / "a055.png")
    with complains(*taken):
        prepare_folder(moved, "album", 32)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_folder_that_others_put_into_the_cache_is_left_alone(album, root):
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "train_images.npy").write_text("precious")
    with complains(root / "mine", "other content"):
        prepare_folder(album, "mine", 32)
    assert (root / "mine" / "train_images.npy").read_text() == "precious"
    assert files_below(root) == ["mine", "mine/train_images.npy"]


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "-x", "ü", "a/b", "a.b", None])
def test_a_name_must_be_plain(album, root, name):
    with complains(repr(name), "letters, digits, - and _"):
        prepare_folder(album, name, 32)
    assert not root.exists()


@pytest.mark.parametrize("name", ["shapes", "cifar10", "celeba64", "celeba256", "Shapes", "CIFAR10"])
def test_the_names_of_built_in_data_sets_are_taken(album, root, name):
    with complains(repr(name), "built-in", "choose another name"):
        prepare_folder(album, name, 32)


@pytest.mark.parametrize("arguments, words", [
    ({"image_size": 30}, ("30 pixels", "multiple of 8", "16 to 1024")), ({"image_size": 0}, ("multiple of 8",)),
    ({"image_size": -32}, ("multiple of 8",)), ({"image_size": 8}, ("16 to 1024",)),
    ({"image_size": 1032}, ("16 to 1024",)),
    ({"image_size": 32.0}, ("multiple of 8",)), ({"heldout": 0}, ("share of 0", "up to 0.5")),
    ({"heldout": 0.6}, ("share of 0.6",)), ({"source": "nowhere"}, ("no folder", "nowhere"))])
def test_impossible_requests_are_refused(album, root, arguments, words):
    with complains(*words):
        prepare_folder(**({"source": album, "name": "x", "image_size": 32} | arguments))
    assert not root.exists()


def test_a_folder_without_images_is_refused(tmp_path, root):
    (tmp_path / "empty").mkdir()
    with complains(tmp_path / "empty", "holds no images", "at least two", ".png", ".webp"):
        prepare_folder(tmp_path / "empty", "x", 32)
    (tmp_path / "empty" / "text.txt").touch()
    (tmp_path / "empty" / "folder.png").mkdir()
    with complains(tmp_path / "empty", "holds no images"):
        prepare_folder(tmp_path / "empty", "x", 32)
    with complains("no folder", tmp_path / "empty" / "text.txt"):
        prepare_folder(tmp_path / "empty" / "text.txt", "x", 32)


def content(kind):
    file = io.BytesIO()
    Image.fromarray(noise((64, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def half_of(whole):
    return whole[:len(whole) // 2]


UNREADABLE = {f"half a {kind}": (f"b/{kind}.{kind}", half_of(content("jpeg" if kind == "jpg" else kind)))
              for kind in ("png", "jpg", "bmp", "webp", "gif")}
UNREADABLE |= {"empty": ("b/x.png", b""), "text": ("b/x.jpg", b"hello"),
               "a wrong byte": ("b/x.png", content("png").replace(b"IDAT", b"IDAT\x07", 1))}


@pytest.mark.parametrize("name, damaged", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_are_named_and_counted(album, root, name, damaged):
    (album / name).write_bytes(damaged)
    (album / "z.png").write_bytes(b"")
    with complains("2 of 23 images", album, f"first of them {name} (", "remove them or convert them to PNG"):
        prepare_folder(album, "album", 32)
    assert files_below(root) == []


def test_pixels_of_unknown_range_are_not_guessed(album, root):
    Image.fromarray(np.ones((32, 32), np.float32)).save(album / "z.tif")
    with complains("1 of 22 images", "z.tif", "unknown range", "convert them"):
        prepare_folder(album, "album", 32)


def test_images_that_are_too_small_are_named_with_their_size(album, root):
    picture(1, 100, 31).save(album / "a11.png")
    picture(1, 8, 8).save(album / "b" / "x.png")
    with complains("2 of 22 images", album, "smaller than 32 pixels", "first of them a11.png with 100 x 31",
                   "smaller size"):
        prepare_folder(album, "album", 32)
    assert files_below(root) == []
    (album / "b" / "y.png").write_bytes(b"")  # what cannot be read comes first
    with complains("1 of 23 images", "b/y.png"):
        prepare_folder(album, "album", 32)


def test_writing_a_folder_that_fails_half_way_leaves_nothing(album, root):
    with complains(root / "album", "could not be written", "free some disk space"):
        with files_no_larger_than(20_000):
            prepare_folder(album, "album", 32)
    assert files_below(root) == []


def test_a_conversion_that_is_interrupted_leaves_nothing(album, root, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "_refuse_failed", stop)  # all images are written by then
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(album, "album", 32)
    assert files_below(root) == []


def test_unknown_names_are_answered_with_those_that_exist(album, root):
    prepare_folder(album, "album", 32)
    prepare_folder(album, "zoo", 16)
    (root / "half").mkdir()
    np.save(root / "half" / "train_images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    assert prepared_names() == ["album", "zoo"]
    for name in ("albums", "half", "../cache/album", ""):
        with complains(repr(name), "shapes, scenes, cifar10, celeba64, celeba256, album, zoo"):
            load_data(name)
    with complains("no split 'dev'"):
        load_data("album", "dev")


@pytest.mark.parametrize("array, words", [
    (np.zeros((4, 32, 24, 3), np.uint8), ("24 x 32 pixels", "square")),
    (np.zeros((4, 32, 32), np.uint8), ("N x N x N x 3",)),
    (np.zeros((4, 32, 32, 3)), ("float64",)), (np.zeros((0, 32, 32, 3), np.uint8), ("N x N x N x 3",))])
def test_damaged_arrays_of_a_folder_are_named(root, array, words):
    (root / "mine").mkdir(parents=True)
    for split in ("train", "test"):
        np.save(root / "mine" / f"{split}_images.npy", array)
    with complains(root / "mine" / "train_images.npy", "remove", *words):
        load_data("mine")


def test_arrays_made_by_others_are_a_data_set_too(root):
    (root / "mine").mkdir(parents=True)
    for split, n in (("train", 3), ("test", 2)):
        np.save(root / "mine" / f"{split}_images.npy", np.zeros((n, 48, 48, 3), np.uint8))
    assert load_data("mine").description == "mine, 3 images" and load_data("mine", "test").image_size == 48
    assert json.dumps(prepared_names()) == '["mine"]'


def test_a_file_name_that_is_no_text_is_a_name_like_any_other(tmp_path, monkeypatch):
    "On Linux a name is any bytes: here Latin-1 in a file system that is read as UTF-8."
    monkeypatch.setenv("HYBRIDVAE_DATA", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "image.png")
        os.rename(tmp_path / "image.png", os.fsencode(tmp_path / "photos") + b"/caf\xe9%d.png" % i)
    for _ in range(2):  # the same call again does nothing
        folder = prepare_folder(tmp_path / "photos", "cafe", 16)
    assert len(np.load(folder / "train_images.npy")) == 2


def test_a_user_without_a_home_folder_needs_only_a_place_for_data(tmp_path):
    "As in a container that runs with a user number that its list of users does not have."
    program = ("import os, sys\nos.environ.pop('HOME', None)\n"
               "from hybridvae.data import data_root\n"
               "os.setuid(54321) if os.getuid() == 0 else None\n"
               "for variable in ('HYBRIDVAE_DATA', 'XDG_CACHE_HOME', 'NEITHER'):\n"
               "    os.environ[variable] = sys.argv[1]\n"
               "    try: print(data_root())\n    except Exception as error: print(type(error).__name__, error)\n"
               "    del os.environ[variable]")
    bare = {k: v for k, v in os.environ.items() if k not in ("HYBRIDVAE_DATA", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=bare)
    assert done.stdout.splitlines() == [
        str(tmp_path), str(tmp_path / "hybridvae"),
        "HybridVAEError there is no home folder to keep data in: set HYBRIDVAE_DATA to a folder."], done.stderr
