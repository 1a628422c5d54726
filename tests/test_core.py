"""Seeded draws, atomic files, run records, weights files, pixels and grids."""
import ast
import errno
import functools
import json
import math
import operator
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import complains, disk_full, files_below
from hybridvae import core
from hybridvae.core import (INT4_LEAST, INT4_SUFFIX, RECORD_KEYS, Draws, HybridVAEError, Model, atomic_path, budget,
                            build_model, change_json, config_hash, count_parameters, default_device, derive_seed,
                            image_grid, load, load_record, load_model, load_records, project_root, provenance,
                            record_path, save_grid, save_model, show_images, to_float, to_uint8, weights_hash,
                            write_record)
from hybridvae.records import results_folder
from hybridvae.vae import VAE
from PIL import Image
from safetensors.torch import load_file, save_file

KINDS = {"randn": lambda d, n: d.randn(n, 3), "rand": lambda d, n: d.rand(n, 3),
         "randint": lambda d, n: d.randint(1000, n, 3)}


# --- draws ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
def test_draws_depend_on_seed_step_and_slice_and_on_nothing_else(draw):
    first = draw(Draws(1, 2, (3,)), 4)
    assert torch.equal(first, draw(Draws(1, 2, (3,)), 4))
    for other in (Draws(0, 2, (3,)), Draws(1, 3, (3,)), Draws(1, 2, (4,))):
        assert not torch.equal(first, draw(other, 4))


@pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
def test_slices_drawn_apart_are_the_whole_batch(draw):
    whole = draw(Draws(0, 5, (0, 1, 2, 3)), 8)
    assert torch.equal(whole, torch.cat([draw(Draws(0, 5, (s,)), 2) for s in range(4)]))
    assert torch.equal(whole, torch.cat([draw(Draws(0, 5, pair), 4) for pair in ((0, 1), (2, 3))]))


def test_later_draws_continue_and_do_not_repeat():
    draws = Draws(0, 0)
    assert not torch.equal(draws.randn(4, 2), draws.randn(4, 2))


def test_draws_have_the_distributions_they_name():
    draws, n = Draws(0, 0), 40_000
    normal, uniform, integers = draws.randn(n), draws.rand(n), draws.randint(5, n)
    assert abs(normal.mean()) < 5 / math.sqrt(n) and abs(normal.var() - 1) < 5 * math.sqrt(2 / n)
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert integers.unique().tolist() == [0, 1, 2, 3, 4] and integers.dtype == torch.int64
    assert (integers.bincount() / n - 0.2).abs().max() < 5 * math.sqrt(0.16 / n)


def test_a_batch_that_does_not_divide_into_the_slices_is_refused():
    with pytest.raises(ValueError, match="7 does not divide into 2 slices"):
        Draws(0, 0, (0, 1)).randn(7, 3)


def test_derived_seeds_keep_their_keys_apart():
    seeds = [derive_seed(*keys) for keys in ((1, 23), (12, 3), (123,), (1, 2, 3), ("order", 1), ("order", 2))]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)


# --- atomic files ---------------------------------------------------------------------------------------------------

def test_a_file_appears_whole_in_folders_made_on_the_way(tmp_path):
    with atomic_path(tmp_path / "a" / "b.txt") as tmp:
        tmp.write_text("whole")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert (tmp_path / "a" / "b.txt").read_text() == "whole" and files_below(tmp_path) == ["a", "a/b.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as tmp:
        tmp.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and files_below(tmp_path) == ["a.txt"]


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp / "part").write_text("half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == []


def test_a_full_disk_is_named_with_its_remedy_and_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with complains(tmp_path / "a.txt", "No space left", "free some disk space"), atomic_path(tmp_path / "a.txt") as tmp:
        tmp.write_text("half")
        disk_full()
    assert (tmp_path / "a.txt").read_text() == "old" and files_below(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_at_the_renaming_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(core.os, "replace", disk_full)
    with complains(tmp_path / "a.txt", "No space left"), atomic_path(tmp_path / "a.txt") as tmp:
        tmp.write_text("whole")
    assert files_below(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with complains(tmp_path / "file" / "a.txt", "choose another folder"), atomic_path(tmp_path / "file" / "a.txt"):
        pass
    assert files_below(tmp_path) == ["file"]


# --- records --------------------------------------------------------------------------------------------------------

def a_record(**changes):
    return {**dict.fromkeys(RECORD_KEYS, 0), "experiment": "vae", "dataset": "shapes", "subset": None, "seed": 0,
            "evaluations": [{"metrics": {"FD (shapes)": {"value": 1.25}}}], **changes}


def test_records_come_back_as_they_were(tmp_path):
    changes = [{}, {"seed": 1}, {"subset": 100}, {"experiment": "ddpm"}, {"dataset": "cifar10"}]
    records = [a_record(**change) for change in changes]
    paths = [write_record(tmp_path, r) for r in records]
    assert len(set(paths)) == 5
    assert paths[0] == tmp_path / "shapes" / "vae" / "seed0.json" == record_path(tmp_path, records[0])
    assert sorted(map(str, load_records(tmp_path))) == sorted(map(str, records))


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_a_record_that_lacks_a_key_is_refused(tmp_path, key):
    record = a_record()
    del record[key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        write_record(tmp_path, record)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_and_the_old_record_stays(tmp_path, number):
    path = write_record(tmp_path, a_record())
    with pytest.raises(ValueError):
        write_record(tmp_path, a_record(evaluations=[{"metrics": {"FD (shapes)": {"value": number}}}]))
    assert load_record(path) == a_record() and files_below(path.parent) == ["seed0.json"]


def test_a_later_folder_replaces_the_records_of_an_earlier_one(tmp_path):
    write_record(tmp_path / "early", a_record(kimg=1))
    write_record(tmp_path / "early", a_record(kimg=1, seed=1))
    write_record(tmp_path / "late", a_record(kimg=2))
    kimg = {r["seed"]: r["kimg"] for r in load_records(tmp_path / "early", tmp_path / "late")}
    assert kimg == {0: 2, 1: 1}
    assert {r["seed"]: r["kimg"] for r in load_records(tmp_path / "late", tmp_path / "early")} == {0: 1, 1: 1}


def test_folders_that_are_not_there_hold_no_records(tmp_path):
    assert load_records(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["{", '{"experiment": "vae"}', "[]", ""])
def test_what_is_not_a_record_is_named(tmp_path, text):
    path = write_record(tmp_path, a_record())
    path.write_text(text)
    with complains(path, "remove it"):
        load_records(tmp_path)


def test_the_config_hash_ignores_the_order_of_keys_and_nothing_else():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({config_hash(c) for c in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]})}) == 5


def test_the_commit_comes_from_the_environment_where_there_is_no_git(monkeypatch):
    monkeypatch.setattr(core, "_git", lambda *args: None)
    monkeypatch.setenv("HYBRIDVAE_COMMIT", "abc123")
    assert (provenance()["commit"], provenance()["dirty"]) == ("abc123", False)
    monkeypatch.delenv("HYBRIDVAE_COMMIT")
    assert (provenance()["commit"], provenance()["dirty"]) == ("none (release 0.1.0)", True)


def test_the_commit_is_that_of_the_repository_that_tracks_the_package_and_of_no_other(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    module = tmp_path / "hybridvae" / "core.py"
    module.parent.mkdir()
    module.write_text("1\n")
    monkeypatch.delenv("HYBRIDVAE_COMMIT", raising=False)
    monkeypatch.setattr(core, "package_folder", lambda: module.parent)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "a project in whose folder the package is installed")
    assert core._commit() == ("none (release 0.1.0)", True)
    git("add", ".")
    git("commit", "--quiet", "-m", "the package")
    assert core._commit() == (git("rev-parse", "HEAD"), False)
    module.write_text("2\n")
    assert core._commit() == (git("rev-parse", "HEAD"), True)


def test_the_gpu_is_used_where_there_is_one_unless_asked_not_to(monkeypatch):
    cases = ((True, False, "cuda"), (True, True, "cpu"), (False, False, "cpu"), (False, True, "cpu"))
    for there, cpu, expected in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_device(cpu) == torch.device(expected)


# --- weights files --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae():
    return VAE(image_size=16, z_dim=4, width=8, multipliers=(1, 2))


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_network_is_laid_out_channels_last_and_stays_the_same_network():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU())
    before, x = network[0].weight.clone(), torch.randn(1, 3, 8, 8)
    expected = network(x)
    assert core.channels_last(network) is network and torch.equal(network[0].weight, before)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), expected)


def test_a_model_comes_back_from_its_weights_file(vae, tmp_path):
    back = load_model(save_model(vae, tmp_path / "deep" / "vae.safetensors"))
    assert type(back) is VAE and back.config == vae.config and not back.training and equal_weights(back, vae)
    assert weights_hash(back) == weights_hash(vae) and count_parameters(back) == count_parameters(vae)


def test_half_precision_halves_the_file_and_loads_as_single(vae, tmp_path):
    half = save_model(vae, tmp_path / "vae.safetensors", torch.float16)
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}
    for name, value in load_model(half).state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, vae.state_dict()[name].half().float())


def test_int4_stores_two_weights_a_byte_with_a_scale_for_each_group(tmp_path):
    "Written plainly: every weight is the nearest of the sixteen levels of its group, small layers are in int8."
    torch.manual_seed(0)
    wide = VAE(image_size=16, z_dim=4, width=50, multipliers=(1, 2))  # rows of 450 weights, no multiple of a group
    path = save_model(wide, tmp_path / "vae.safetensors", torch.int4)
    stored, back, state = load_file(path), load_model(path).state_dict(), wide.state_dict()
    large = [name for name in stored if f"{name}{INT4_SUFFIX}" in stored]
    assert large == sorted(n for n, t in state.items() if t.ndim in (2, 4) and t.numel() >= INT4_LEAST)
    assert {stored[n].dtype for n in state.keys() - {*large}} == {torch.int8, torch.float16}
    for name in large:
        rows, scale = state[name].flatten(1), stored[name + INT4_SUFFIX].float()
        assert stored[name].dtype == torch.uint8 and 2 * stored[name].numel() < 1.05 * rows.numel() + 1_000
        assert stored[name].shape == (len(rows), 16 * -(-rows.shape[1] // 32)) and scale.shape[1] * 32 >= rows.shape[1]
        levels = scale.repeat_interleave(32, dim=1)[:, :rows.shape[1], None] * torch.arange(-8, 8)
        nearest = levels.gather(2, (levels - rows[..., None]).abs().argmin(dim=2, keepdim=True))[..., 0]
        assert (back[name].flatten(1) - rows).abs().le((nearest - rows).abs() + 1e-6).all()  # of two as near either
        assert (back[name] - state[name]).square().mean() < 0.01 * state[name].square().mean()
    for name in state.keys() - {*large}:
        torch.testing.assert_close(back[name], state[name], rtol=0, atol=0.005 * state[name].abs().max().item() + 1e-6)


def test_int4_keeps_what_has_no_size(tmp_path):
    zero = VAE(image_size=16, z_dim=4, width=50, multipliers=(1, 2))
    for p in zero.parameters():
        p.data.zero_()
    assert equal_weights(load_model(save_model(zero, tmp_path / "zero.safetensors", torch.int4)), zero)


def test_the_weights_hash_sees_every_tensor(vae):
    before, copy = weights_hash(vae), VAE.from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    assert weights_hash(copy) == before
    for p in copy.parameters():
        p.data.flatten()[0] += 1
        assert weights_hash(copy) != before
        p.data.flatten()[0] -= 1


def truncated(path, vae):
    save_model(vae, path)
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path, vae):
    save_file({"weight": torch.zeros(3)}, path)


def of_another_shape(path, vae):
    save_file({k: v[:1] for k, v in vae.state_dict().items()}, path, metadata={"config": json.dumps(vae.config)})


def empty(path, vae):
    path.write_bytes(b"")


def text(path, vae):
    path.write_text("x" * 99)


@pytest.mark.parametrize("damage", [truncated, foreign, of_another_shape, empty, text])
def test_a_file_that_holds_no_model_is_named(vae, tmp_path, damage):
    damage(tmp_path / "vae.safetensors", vae)
    with complains(tmp_path / "vae.safetensors", "train or download it again"):
        load_model(tmp_path / "vae.safetensors")


def test_a_weights_file_that_is_not_there_is_named(tmp_path):
    with complains(tmp_path / "none.safetensors", "give the path"):
        load_model(tmp_path / "none.safetensors")


def test_shipped_weights_have_names_and_a_path_comes_first(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_WEIGHTS", str(tmp_path / "shipped"))
    save_model(vae, tmp_path / "shipped" / "small.safetensors")
    assert equal_weights(load("small"), vae) and equal_weights(load(tmp_path / "shipped" / "small.safetensors"), vae)
    with complains("no weights 'large'", "small"):
        load("large")
    other = VAE.from_config(vae.config)
    monkeypatch.chdir(tmp_path)
    save_model(other, "small")
    assert equal_weights(load("small"), other)


def test_weights_of_a_class_that_is_not_imported_are_not_called_damaged(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"config": '{"model": "OfAnotherPackage"}'})
    with complains("OfAnotherPackage", "import the module that defines it first"):
        load_model(path)


def test_weights_and_records_are_beside_the_package_or_inside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "package_folder", lambda: tmp_path / "hybridvae")
    assert project_root() == tmp_path
    (tmp_path / "hybridvae" / "nbs").mkdir(parents=True)
    assert project_root() == tmp_path / "hybridvae"


def test_weights_that_do_not_fit_on_the_disk_leave_nothing(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(core.os, "replace", disk_full)
    with complains(tmp_path / "vae.safetensors", "No space left"):
        save_model(vae, tmp_path / "vae.safetensors")
    assert files_below(tmp_path) == []


def test_weights_that_grow_too_large_for_the_file_system_get_the_same_sentence(vae, tmp_path):
    "The safetensors library has an exception of its own for a write that fails; a limit on file sizes makes one fail."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with complains(tmp_path / "vae.safetensors", "free some disk space"):
            save_model(vae, tmp_path / "vae.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_below(tmp_path) == []


def test_a_config_that_names_no_class_or_no_argument_is_refused():
    with complains("no model class 'VEA'", "VAE"):
        build_model({"model": "VEA"})
    with complains("cannot be built from {}", "names its class"):
        build_model({})
    with complains("the config of VAE does not fit", "widht"):
        build_model({"model": "VAE", "widht": 3})


def test_a_new_model_class_is_known_by_its_name():
    try:
        Dummy = type("Dummy", (Model,), {})
        assert isinstance(build_model({"model": "Dummy"}), Dummy)
    finally:
        core.MODELS.pop("Dummy", None)


# --- pixels and grids -----------------------------------------------------------------------------------------------

def test_every_byte_survives_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    x = to_float(pixels)
    assert (x.min(), x.max(), x.dtype, x.shape) == (-1, 1, torch.float32, (2, 3, 16, 16))
    assert torch.equal(to_uint8(x), pixels.permute(0, 3, 1, 2))


def test_pixels_are_rounded_to_the_nearest_byte_and_clipped():
    levels = torch.tensor([-0.4, 0.4, 0.6, 99.6, 100.4, 254.4, 254.6, 255.4, 400.0, -400.0])
    found = to_uint8((levels / 127.5 - 1).reshape(1, 1, 2, 5)).flatten().tolist()
    assert found == [0, 0, 1, 100, 100, 254, 255, 255, 255, 0]


def test_a_grid_puts_each_image_in_its_row_and_column():
    images = torch.randint(255, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))  # no white
    picture = image_grid(images, columns=3, padding=2)
    assert picture.shape == (2 * 6 - 2, 3 * 8 - 2, 3) and picture.dtype == np.uint8
    white = np.ones(picture.shape[:2], bool)
    for i, (top, left) in enumerate([(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]):
        np.testing.assert_array_equal(picture[top:top + 4, left:left + 6], images[i].permute(1, 2, 0))
        white[top:top + 4, left:left + 6] = False
    assert (picture[white] == 255).all()


def test_a_grid_of_few_grey_floats_is_narrow_and_has_three_equal_channels():
    picture = image_grid(torch.linspace(-1, 1, 2 * 4).reshape(2, 1, 2, 2), columns=8, padding=1)
    assert picture.shape == (2, 5, 3) and (picture == picture[..., :1]).all()


def test_names_stand_at_the_middle_of_their_rows_and_columns():
    images = torch.zeros(6, 3, 4, 6)
    ax = show_images(images, "what to see", columns=["a", "b", "c"], rows=["x", "y"])
    places = lambda axis: [(tick.get_loc(), tick.label2.get_text() or tick.label1.get_text())
                           for tick in axis.get_major_ticks()]
    assert places(ax.xaxis) == [(2.5, "a"), (9.5, "b"), (16.5, "c")]
    assert places(ax.yaxis) == [(1.5, "x"), (6.5, "y")] and ax.get_title() == "what to see"


def test_a_grid_without_names_has_none_and_is_large_unless_told_otherwise():
    ax = show_images(torch.zeros(16, 3, 32, 32))
    assert not ax.get_xticks().size and not ax.get_yticks().size
    assert ax.figure.get_figwidth() * 72 / (8 * 33 - 1) >= 3
    assert show_images(torch.zeros(2, 3, 32, 32), zoom=1).figure.get_figwidth() * 72 == pytest.approx(65)


def test_names_of_a_wide_grid_can_be_read_on_a_phone_and_do_not_meet():
    names = [f"noise number {n}" for n in range(8)]
    title = "a title of " + "many words " * 20
    ax = show_images(torch.zeros(16, 3, 32, 32), title, columns=names, rows=["a", "b " * 9])
    figure = ax.figure
    figure.canvas.draw()
    drawn = [label.get_window_extent() for label in ax.get_xticklabels(which="both") if label.get_text()]
    labels = [label for label in ax.get_xticklabels() + ax.get_yticklabels() + [ax.title] if label.get_text()]
    assert min(label.get_fontsize() for label in labels) * 350 / (figure.get_figwidth() * 72) > 7
    assert all(a.x1 <= b.x0 for a, b in zip(drawn, drawn[1:]))
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
               for box in (label.get_window_extent() for label in labels))


@pytest.mark.parametrize("names", [{"rows": ["x"]}, {"columns": ["a", "b", "c", "d"], "rows": ["x", "y", "z"]}])
def test_names_of_another_number_than_the_rows_are_refused(names):
    with pytest.raises(HybridVAEError, match="rows has . names for 2 rows of images: give one for each"):
        show_images(torch.zeros(6, 3, 4, 4), **{"columns": 3, **names})


def test_a_grid_on_disk_is_the_grid(tmp_path):
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = save_grid(images, tmp_path / "a" / "grid.png", columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image_grid(images, columns=2))


# --- budget ---------------------------------------------------------------------------------------------------------

def test_the_budget_scales_training(monkeypatch):
    monkeypatch.delenv("HYBRIDVAE_BUDGET", raising=False)
    assert budget(40) == 40
    monkeypatch.setenv("HYBRIDVAE_BUDGET", "0.1")
    assert budget(40) == pytest.approx(4)


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf"])
def test_a_budget_that_is_no_positive_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("HYBRIDVAE_BUDGET", text)
    with complains(f"HYBRIDVAE_BUDGET is {text!r}", "positive number"):
        budget(1)


# --- one process at a time ------------------------------------------------------------------------------------------

HOLDER = """import sys, time
from hybridvae.core import sole_use
with sole_use(sys.argv[1]):
    print('mine', flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_process_ends_however_it_ends(tmp_path):
    "The lock is one of the kernel's: that of a process that is killed does not stay behind."
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        with complains(tmp_path / "run", "in use by another process"), core.sole_use(tmp_path / "run"):
            pytest.fail("two processes had it")
    finally:
        holder.kill()
        holder.wait()
    with core.sole_use(tmp_path / "run"), core.sole_use(tmp_path / "x" / ".." / "run"):  # and a process may ask again
        pass
    with core.sole_use(tmp_path / "run"):
        assert files_below(tmp_path) == ["run", "run/.lock"]


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "free some disk space"), (errno.EACCES, "choose another folder"),
    (errno.ENOTEMPTY, "run the same command again"), (errno.ENOENT, "run the same command again")])
def test_the_remedy_for_a_failed_write_fits_its_reason(tmp_path, number, words):
    with complains(tmp_path / "a.txt", os.strerror(number), words) as said, core.atomic_path(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert ("disk space" in str(said.info.value)) == (number == errno.ENOSPC)


def test_a_folder_that_another_process_has_made_meanwhile_is_left_alone(tmp_path):
    with complains(tmp_path / "folder", "run the same command again"), atomic_path(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert files_below(tmp_path) == ["folder", "folder/theirs"]


def test_our_own_text_files_are_utf_8_whatever_the_locale():
    "Every text file that a module opens has its encoding stated."
    for path in core.package_folder().glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
            if name in ("read_text", "write_text") or (name == "open" and {"r", "rt", "w", "wt", "a"} & set(modes)):
                assert "encoding" in [k.arg for k in call.keywords], f"{path.name}, line {call.lineno}"


# --- configs that somebody has edited -------------------------------------------------------------------------------

EDITS = {"patch": [0, -2, 1.5, "2", None], "multipliers": [[], [0], 3, ["a"], [1, math.nan]],
         "image_size": [0, 17, 10**20], "width": [0, -8, 2.5, [8]], "blocks": [0, "many"],
         "sigma": [0, -1, math.nan, math.inf, "x"],
         "prior": [{}, {"prior": "x"}, 7], "z_dim": [0, -1, "z"], "beta": [math.nan], "colour": ["red"]}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in EDITS.items() for value in values])
def test_a_config_edited_by_hand_gets_one_sentence(vae, tmp_path, key, value):
    path = save_model(vae, tmp_path / "vae.safetensors")
    save_file(load_file(path), path, metadata={"config": json.dumps(vae.config | {key: value})})
    no_size = key in core.SIZES and value in (0, -2, -8, 1.5, 2.5, "2", "many", [], [0], ["a"], 10**20)
    with complains(path, "does not hold a hybridvae model", f"{key} of VAE is" if no_size else ""):
        load_model(path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"VAE"', "{", '{"model": ["VAE"]}',
                                  '{"model": "VAE", "z_dim": {}}'])
def test_a_config_that_is_none_gets_one_sentence(vae, tmp_path, text):
    path = save_model(vae, tmp_path / "vae.safetensors")
    save_file(load_file(path), path, metadata={"config": text})
    with complains(path, "does not hold a hybridvae model"):
        load_model(path)


def test_the_reason_for_refusing_weights_is_the_whole_one(vae, tmp_path):
    path = save_model(vae, tmp_path / "vae.safetensors")
    state = load_file(path)
    state.pop("encoder.net.0.bias")
    save_file(state, path, metadata={"config": json.dumps(vae.config)})
    with complains(path, "Missing key", "encoder.net.0.bias"):
        load_model(path)
    with complains("multipliers of VAE.unet is []"):
        build_model({"model": "VAE", "unet": {"multipliers": []}})


def test_those_who_change_a_file_at_once_lose_nothing(tmp_path):
    def add(k):
        return change_json(tmp_path / "new" / "file.json", lambda before: time.sleep(0.01) or before | {str(k): k})
    with ThreadPoolExecutor(8) as pool:
        [path, *_] = pool.map(add, range(24))
    assert json.loads(path.read_text()) == {str(k): k for k in range(24)}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_holds_no_results_is_named_and_stays(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with complains(path, "choose another file"):
        change_json(path, lambda before: before | {"new": 1})
    assert path.read_text() == text


def _leaves(value, keys=()):
    "The keys that lead to each value of JSON, the inner ones too."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*keys, key)
        yield from _leaves(part, (*keys, key))


def test_a_record_in_which_anything_was_changed_by_hand_is_refused(tmp_path):
    path = write_record(tmp_path, a_record(evaluations=[{"n": 10, "metrics": {"FD (x)": {"value": 1.5}}}]))
    whole = json.loads(path.read_text())
    assert "checksum" not in load_records(tmp_path)[0] and len(list(_leaves(whole))) > 20
    for *keys, last in _leaves(whole):
        for change in (operator.setitem, operator.delitem):
            changed = json.loads(json.dumps(whole))
            change(functools.reduce(operator.getitem, keys, changed), last, *[1.25] * (change is operator.setitem))
            path.write_text(json.dumps(changed))
            if (*keys, last) == ("checksum",) and "checksum" not in changed:
                continue  # as in records from before there were any
            with complains(path, "run its entry again"):
                load_records(tmp_path)


def test_committed_records_are_as_they_were_written():
    files = sorted(results_folder().glob("*/*/seed*.json"))
    assert len(files) > 90 and all("checksum" in json.loads(path.read_text()) for path in files)
    assert len(load_records(results_folder())) == len(files)
