"""Entries, records, runs: what is measured, how a run stops and continues, which network measures, what tables hold."""
import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complains, files_below, generator
from hybridvae import data, records, runs, training
from hybridvae.campaign import load_stages, run_campaign
from hybridvae.core import (RECORD_KEYS, HybridVAEError, Model, build_model, config_hash, load_model, load_record,
                            load_records, randn, read_json, record_path, save_model, sealed, weights_hash,
                            write_record)
from hybridvae.data import load_data
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.entries import OPTIONS, Entry, find_entry, studied_with
from hybridvae.experiments import PRESETS
from hybridvae.features import FaceEncoder, load_features, shipped_features
from hybridvae.metrics import describe, frechet_distance
from hybridvae.pca_guidance import ProjectingPCA, mean_codes
from hybridvae.records import (
    answers_of,
    evaluation_of,
    floor_of,
    mean_and_spread,
    no_record,
    outdated,
    recorded,
    results_table,
    values_of,
)
from hybridvae.runs import evaluate, run_entry
from hybridvae.vae import VAE
from PIL import Image
from safetensors.torch import load_file

TINY_VAE = {"image_size": 32, "z_dim": 4, "width": 8, "multipliers": [1, 2], "patch": 4}
TINY_UNET = {"image_size": 32, "width": 16, "multipliers": [1], "attention": [], "patch": 4}
TRAIN = {"kimg": 0.048, "batch_size": 16, "lr": 1e-3}  # 3 steps
NETWORK = Entry("features", "shapes", PRESETS["shapes"]["features"], PRESETS["shapes"]["train_features"])
COARSE = Entry("vae", "shapes", {"model": "VAE", **TINY_VAE}, TRAIN, features="features", batch=12,
               evaluations=({"sampler": None, "steps": 1, "n": 20},
                            {"sampler": None, "steps": 1, "n": 20, "prior": "ex-pde"}))
HYBRID = Entry("hybrid", "shapes", {"model": "DiffuseVAE", "vae": TINY_VAE, "unet": TINY_UNET, "form": 2,
                                    "cond_dropout": 0.1},
               TRAIN, features="features", depends_on={"vae": "vae"}, batch=12, n_study=8, studies=("first", "second"),
               evaluations=({"sampler": "dpmpp", "steps": 2, "n": 20},
                             {"sampler": "ddim", "steps": 1, "n": 12, "guidance_weight": 2.0}))
ENTRIES = [NETWORK, COARSE, HYBRID]
CALLS = []  # of studies


@pytest.fixture(scope="module", autouse=True)
def small():
    "Few images, and two studies that say when they are called."
    def study(name):
        def answer(model, m):
            CALLS.append(name)
            return {"n": m.n, "parts": [n for n, _ in m.parts()],
                    "mean": model.sample(m.n, steps=1, generator=generator(m.seed)).mean().item()}
        return answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 60, "test": 40})
        for name in ("first", "second"):
            patch.setitem(runs.STUDIES, name, study(name))
        patch.delenv("HYBRIDVAE_INCEPTION", raising=False)
        yield


def run(entry, folder, minutes=None, entries=ENTRIES):
    return run_entry(entry, entries, folder, minutes, cpu=True, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Folder and record of a run that was not interrupted."
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(HYBRID, folder)


TIMES = ("commit", "dirty", "device", "versions", "train_seconds", "train_cpu_seconds", "train_images_per_second",
         "peak_memory_bytes",
         "seconds_per_image", "parts")


def results(value):
    "A record without what depends on the machine and its mood."
    if isinstance(value, dict):
        return {k: results(v) for k, v in value.items() if k not in TIMES}
    return [results(v) for v in value] if isinstance(value, list) else value


# --- the record -----------------------------------------------------------------------------------------------------

def test_a_record_has_every_key_and_what_was_asked_for(whole):
    folder, record = whole
    assert set(RECORD_KEYS) | {"data", "history", "precision", "compiled"} <= set(record)
    assert load_record(record_path(folder, vars(HYBRID))) == record == recorded(HYBRID, folder)
    assert record["config"] == HYBRID.config and record["config_hash"] == config_hash(HYBRID.config)
    assert (record["kimg"], record["seed"], record["subset"]) == (0.048, 0, None)
    for found, asked in zip(record["evaluations"], HYBRID.evaluations, strict=True):
        assert asked.items() <= found.items() and {"commit", "dirty", "device", "seconds_per_image",
                                                   "batch"} <= set(found)
        assert {"FD (shapes)", "FD (shapes) to training set", "KID (shapes)"} <= set(found["metrics"])
        assert "class score (shapes)" not in found["metrics"]  # of so few images
        digest = weights_hash(load_features("shapes"))
        assert all(m["hash"] == digest for m in found["metrics"].values() if m["feature_network"] == "shapes")
    assert (
        record["first"]["n"] == 8
        and record["first"]["parts"] == [8]
        and set(record["second"]) == {"n", "parts", "mean"}
    )
    assert record["flops_per_image"] > 0
    assert record["parameters"] == sum(p.numel() for p in build_model(HYBRID.model).unet.parameters())
    assert HYBRID.missing(record) == []


def test_weights_are_beside_the_record_and_hold_the_network_it_depends_on(whole):
    folder, record = whole
    model, vae = (load_model(e.folder(folder) / "model.safetensors") for e in (HYBRID, COARSE))
    assert weights_hash(model) == record["weights_hash"] and record["depends_on"] == {"vae": weights_hash(vae)}
    assert weights_hash(model.vae) == weights_hash(vae)
    assert recorded(COARSE, folder) is None  # it was trained, not measured: it has no record


def test_pictures_beside_a_record_have_ten_by_ten_images_and_show_pairs(whole):
    folder, _ = whole
    side = 10 * 32 + 9
    for name in ("seed0.png", "seed0-pairs.png"):
        assert Image.open(folder / "shapes" / "hybrid" / name).size == (side, side)
    assert not list(folder.glob("shapes/*/seed*/*.png"))


def test_beside_a_path_length_stands_a_picture_of_paths(whole, monkeypatch, tmp_path):
    folder, _ = whole
    assert not list(folder.glob("shapes/hybrid/*paths*"))
    monkeypatch.setitem(runs.STUDIES, "path_length", lambda model, m: {"n": m.n, "x̂": 1.0})
    record = run(dataclasses.replace(HYBRID, studies=("path_length",)), tmp_path)
    path = record_path(tmp_path, record).with_name("seed0-paths.png")
    assert Image.open(path).size == (10 * 32 + 9, 6 * 32 + 5)  # three ways, two rows


def test_the_same_entry_gives_the_same_numbers_and_another_seed_others(whole, tmp_path):
    folder, record = whole
    assert results(run(HYBRID, tmp_path)) == results(record)
    other = dataclasses.replace(COARSE, seed=1)
    seeds = [run(e, tmp_path, entries=[*ENTRIES, other]) for e in (COARSE, other)]
    assert seeds[0]["weights_hash"] != seeds[1]["weights_hash"] and seeds[0]["config_hash"] == seeds[1]["config_hash"]
    assert seeds[0]["evaluations"][0]["metrics"] != seeds[1]["evaluations"][0]["metrics"]


def test_a_record_is_measured_in_full_precision_and_nothing_of_it_is_compiled(tmp_path, monkeypatch):
    "On hardware with fast bfloat16: only images are made in half precision."
    where, compiling = {}, [True]

    @contextlib.contextmanager
    def eager():
        compiling[0] = False
        yield
        compiling[0] = True

    def note(cls, name):
        function = getattr(cls, name)

        def noted(self, *args, **options):
            where[name] = torch.is_autocast_enabled("cpu"), compiling[0]
            return function(self, *args, **options)
        monkeypatch.setattr(cls, name, noted)
    monkeypatch.delenv("HYBRIDVAE_PRECISION", raising=False)
    monkeypatch.setattr(training, "supports_bf16", lambda device: True)
    monkeypatch.setattr(runs, "eager", eager)
    monkeypatch.setitem(runs.STUDIES, "precision", lambda model, m: [torch.is_autocast_enabled("cpu"), compiling[0]])
    for name in ("sample", "measures", "showcase"):
        note(VAE, name)
    record = run(dataclasses.replace(COARSE, studies=("precision",)), tmp_path)
    where["study"] = tuple(record["precision"])
    half, full, compiled = True, False, False
    assert where == {"measures": (full, compiled), "study": (half, compiled), "showcase": (half, compiled),
                     "sample": (half, compiled)}  # its last call, for the pictures


# --- what is recorded is not run again ------------------------------------------------------------------------------

def test_what_is_recorded_is_not_run_again_and_another_config_is_refused(whole, monkeypatch):
    folder, record = whole
    monkeypatch.setattr(runs, "build_model", None)  # nothing may be built
    before = files_below(folder)
    assert run(HYBRID, folder) == record
    changed = dataclasses.replace(HYBRID, train={**TRAIN, "lr": 5e-4})
    assert changed.missing(record) == ["training"]
    with complains("another config", HYBRID.folder(folder)):
        run(changed, folder)
    assert files_below(folder) == before


def test_missing_names_what_a_record_lacks(whole):
    _, record = whole
    assert HYBRID.missing(None) == ["training"]
    for change in (dict(model={**HYBRID.model, "form": 1}), dict(subset=30), dict(depends_on={}),
                   dict(train={"kimg": 1})):
        assert dataclasses.replace(HYBRID, **change).missing(record) == ["training"], change
    more = dataclasses.replace(HYBRID, studies=("first", "third"), evaluations=(
        *HYBRID.evaluations, {"sampler": "ddim", "steps": 1, "n": 12},
        {"sampler": "dpmpp", "steps": 2, "n": 2000, "prior": "ex-pde"}))
    assert more.missing(record) == ["ddim 1, n = 12", "dpmpp 2, prior ex-pde, n = 2,000", "third"]
    for same in (dict(seed=3), dict(batch=3), dict(parameters=1.0)):  # which decide nothing that was measured
        assert dataclasses.replace(HYBRID, **same).missing(record) == []


def test_a_study_with_another_number_of_images_or_steps_is_missing_and_done_again(whole, tmp_path):
    folder, record = whole
    assert record["studied"] == {"first": {"n": 8, "steps": 20}, "second": {"n": 8, "steps": 20}}
    assert dataclasses.replace(HYBRID, n_study=9).missing(record) == ["first, n = 9, 20 steps",
                                                                      "second, n = 9, 20 steps"]
    fewer = dataclasses.replace(HYBRID, steps_study=3, studies=("first",))
    assert fewer.missing(record) == ["first, n = 8, 3 steps"]
    other = dataclasses.replace(HYBRID, prior_study="ex-pde", studies=("first", "robustness"))  # only one draws codes
    measured = record | {"robustness": 1, "studied": record["studied"] | {"robustness": {"n": 8, "steps": 20}}}
    assert other.missing(measured) == ["robustness, n = 8, 20 steps, prior ex-pde"]
    measured["studied"]["robustness"] = other.studied("robustness")
    assert other.missing(measured) == []
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CALLS.clear()
    again = run(dataclasses.replace(HYBRID, n_study=9), tmp_path)
    assert (
        CALLS == ["first", "second"] and again["first"]["n"] == 9 and again["studied"]["first"] == {"n": 9, "steps": 20}
    )
    assert again["evaluations"] == record["evaluations"]


def test_what_older_records_were_studied_with_agrees_with_their_answers():
    "They say n only in the answers, which some studies make with several times as many images."
    times, seen = {"adaptive": 4, "noise": 4, "truncation": 4, "priors": 2}, set()
    load_stages()
    for record in load_records(records.results_folder()):
        for name in set(runs.STUDIES) - {"uncertainty", *record.get("studied", {})}:
            if name in record and "n" in record[name]:
                n = times.get(name, 1) * studied_with(record, name)["n"]
                assert record[name]["n"] == n, (record["experiment"], name)
                seen.add(name)
    assert {"ceiling", "code_fit", "path_length", "prior_gap", "robustness", *times} <= seen


def test_40_and_40_0_are_one_number(whole):
    other = dataclasses.replace(HYBRID, model={**HYBRID.model, "form": 2.0}, train={**TRAIN, "batch_size": 16.0})
    assert other.missing(whole[1]) == []
    assert dataclasses.replace(HYBRID, train={**TRAIN, "batch_size": 16.5}).missing(whole[1]) == ["training"]


def test_an_evaluation_with_an_option_that_no_model_knows_is_refused():
    for evaluation, words in (({"sampler": None, "steps": 1, "n": 5, "temperature": 0.5},
                               "unknown option 'temperature'"),
                              ({"sampler": None, "n": 5}, "does not name 'steps'")):
        with complains("an evaluation of vae", words):
            dataclasses.replace(COARSE, evaluations=(evaluation,))


def test_every_option_of_an_evaluation_is_an_argument_of_some_model():
    known = {name for module in ("diffusion", "diffusevae", "adaptive", "latent", "pca_guidance")
             for part in vars(importlib.import_module(f"hybridvae.{module}")).values() if inspect.isclass(part)
             for method in vars(part).values() if inspect.isfunction(method)
             for name in inspect.signature(method).parameters}
    assert set(OPTIONS) <= known


def test_entries_have_a_hash():
    assert len({HYBRID, dataclasses.replace(HYBRID), COARSE}) == 2
    assert hash(HYBRID) == hash(dataclasses.replace(HYBRID, batch=3)) and HYBRID != dataclasses.replace(HYBRID, batch=3)


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    first = run(COARSE, tmp_path)
    more = dataclasses.replace(COARSE, evaluations=(*COARSE.evaluations, {"sampler": None, "steps": 1, "n": 12}))
    measured = spy(monkeypatch, runs, "evaluate")
    monkeypatch.setattr(runs, "train", None)
    record = run(more, tmp_path)
    assert [call[3]["n"] for call in measured] == [12] and more.missing(record) == []
    assert record["evaluations"][:2] == first["evaluations"]


def test_an_unknown_entry_is_named_with_the_known_ones():
    assert find_entry(ENTRIES, "vae") is COARSE
    for arguments in (("gan",), ("vae", 7), ("vae", 0, "cifar10")):
        with complains(repr(arguments[0]), "choose from"):
            find_entry(ENTRIES, *arguments)


# --- stopping and continuing ----------------------------------------------------------------------------------------

class CountedClock(runs.Clock):
    "A clock that has run out after so many looks at it."

    def __init__(self, looks):
        self.looks = float("inf") if looks is None else looks

    def left(self):
        self.looks -= 1
        return None if self.looks >= 0 else 0.0


def spy(monkeypatch, module, name):
    "A list of the arguments of every call that came to its end."
    calls, function = [], getattr(module, name)

    def called(*args, **options):
        result = function(*args, **options)
        calls.append(args)
        return result
    monkeypatch.setattr(module, name, called)
    return calls


def test_a_run_stopped_at_every_moment_in_turn_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    _, record = whole
    monkeypatch.setattr(runs, "Clock", CountedClock)
    measured, stops = spy(monkeypatch, runs, "evaluate"), []
    CALLS.clear()
    for looks in (0, 1, 2, 3, 2, 1, 1, 1, 1):  # a batch that is drawn is not drawn again
        assert run(HYBRID, tmp_path, minutes=looks) is None
        assert not list(tmp_path.glob("*/*/seed*.json"))  # no record of an unfinished run
        trained, begun = (len(list(tmp_path.glob(f"shapes/*/seed0/{name}")))
                          for name in ("trained.json", "checkpoint-*"))
        path = HYBRID.folder(tmp_path) / "measured.json"
        known = json.loads(path.read_text()) if path.exists() else {"evaluations": []}
        stops.append((trained, begun, len(known["evaluations"]), "first" in known))
    assert stops == [
        (0, 0, 0, False), (0, 0, 0, False), (0, 1, 0, False), (1, 2, 0, False),  # before and within either training
        (2, 2, 0, False), (2, 2, 0, False), (2, 2, 1, False),
                     (2, 2, 2, False),  # before, within and between evaluations
        (2, 2, 2, True)]  # and between the studies
    assert results(run(HYBRID, tmp_path, minutes=1)) == results(record)
    assert len(measured) == 2 and CALLS == ["first", "second"]  # nothing was measured twice


def test_a_limit_in_minutes_stops_and_the_same_command_continues(tmp_path):
    assert run(COARSE, tmp_path, minutes=0) is None
    assert not list(tmp_path.glob("*/*/seed*.json"))
    assert run(COARSE, tmp_path, minutes=10)["evaluations"]


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_run_that_died_in_a_study_goes_on_from_there(whole, tmp_path, monkeypatch, when):
    _, record = whole

    def die(model, material):
        raise RuntimeError("killed")
    with monkeypatch.context() as patch:
        patch.setitem(runs.STUDIES, when, die)
        with pytest.raises(RuntimeError, match="killed"):
            run(HYBRID, tmp_path)
    assert not list(tmp_path.glob("*/*/seed*.json"))
    for name in ("train", "evaluate"):
        monkeypatch.setattr(runs, name, None)  # which may not be called again
    CALLS.clear()
    assert results(run(HYBRID, tmp_path)) == results(record)
    assert CALLS == (["first", "second"] if when == "first" else ["second"])


def test_a_run_that_died_between_its_last_step_and_its_weights_needs_no_more_steps(tmp_path, monkeypatch):
    whole = run(COARSE, tmp_path)
    record_path(tmp_path, vars(COARSE)).unlink()
    for name in ("trained.json", "model.safetensors", "measured.json"):
        (COARSE.folder(tmp_path) / name).unlink()
    monkeypatch.setattr(VAE, "reconstruct", lambda self, x: x)  # only to tell that measuring is done anew
    again = run(COARSE, tmp_path)
    assert again["weights_hash"] == whole["weights_hash"] and again["history"] == whole["history"]
    assert again["heldout_reconstruction_mse"] == 0


# --- networks that an entry depends on ------------------------------------------------------------------------------

def test_a_dependency_without_weights_is_trained_again_and_named_by_the_weights_used(whole, tmp_path):
    _, record = whole
    first = run(COARSE, tmp_path)
    folder = COARSE.folder(tmp_path)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    other = {**first, "weights_hash": "of another machine"}  # whose arithmetic differs in the last digit
    write_record(tmp_path, other)
    found = run(HYBRID, tmp_path)
    assert (
        found["depends_on"] == record["depends_on"] == {"vae": weights_hash(load_model(folder / "model.safetensors"))}
    )
    assert recorded(COARSE, tmp_path) == other  # a record says what was measured, and is left alone


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    "A record of the VAE whose weights are gone, and a hybrid with its weights, in int8, with a prior fitted to codes."
    folder, weights = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("weights")
    record = run(COARSE, folder)
    hybrid = DiffuseVAE({**TINY_VAE, "prior": {"prior": "GaussianMixture", "dim": 4, "components": 2}}, TINY_UNET)
    hybrid.vae.load_state_dict(load_model(COARSE.folder(folder) / "model.safetensors").state_dict(), strict=False)
    save_model(hybrid, weights / "small.safetensors", torch.int8)
    return record, weights


def hybrid_of(gone, monkeypatch, folder, recorded=True, **changes):
    "The record of the hybrid whose VAE is recorded, or not, and shipped; the VAE's folder."
    record, weights = gone
    monkeypatch.setattr(runs, "weights_folder", lambda: weights)
    parent = dataclasses.replace(COARSE, **{"shipped": "small"} | changes)
    if recorded:
        write_record(folder, record | {"config": json.loads(json.dumps(parent.config))})
    return run(HYBRID, folder, entries=[NETWORK, parent, HYBRID]), parent.folder(folder)


def test_a_recorded_dependency_whose_weights_are_gone_is_the_shipped_one(gone, tmp_path, monkeypatch):
    found, folder = hybrid_of(gone, monkeypatch, tmp_path)
    shipped = load_model(gone[1] / "small.safetensors").vae
    whole = load_model(HYBRID.folder(tmp_path) / "model.safetensors")
    assert not (folder / "trained.json").exists()
    assert all(torch.equal(v, shipped.state_dict()[k]) for k, v in whole.vae.state_dict().items())
    assert found["depends_on"] == {"vae": weights_hash(whole.vae)} != {"vae": gone[0]["weights_hash"]}


@pytest.mark.parametrize("changes", [
    {"recorded": False}, {"shipped": None}, {"shipped": "absent"}, {"model": COARSE.model | {"sigma": 0.1}}])
def test_shipped_weights_take_the_place_of_no_other_run(gone, tmp_path, monkeypatch, changes):
    "Of one without a record, of one whose weights are not shipped, of one with another config."
    assert (hybrid_of(gone, monkeypatch, tmp_path, **changes)[1] / "trained.json").exists()


def test_the_weights_of_the_run_itself_come_before_shipped_ones(gone, whole, tmp_path, monkeypatch):
    shutil.copytree(COARSE.folder(whole[0]), COARSE.folder(tmp_path))
    assert hybrid_of(gone, monkeypatch, tmp_path)[0]["depends_on"] == whole[1]["depends_on"]


def test_a_model_that_is_put_together_measures_the_training_images_too(tmp_path):
    parts = {"vae": TINY_VAE, "unet": TINY_UNET, "form": 1, "z_guidance": True}
    guided = Entry("guided", "shapes", {"model": "DiffuseVAE", **parts}, TRAIN, depends_on={"vae": "vae"})
    pca = Entry("pca", "shapes", {"model": "PCADiffuseVAE", **parts, "components": 2}, None,
                depends_on={"vae": "guided", "unet": "guided"})
    run(pca, tmp_path, entries=[COARSE, guided, pca])
    model = load_model(pca.folder(tmp_path) / "model.safetensors")
    expected = ProjectingPCA(TINY_VAE["z_dim"])
    expected.measure(mean_codes(model.vae, load_data("shapes")))
    assert torch.allclose(model.pca.variance, expected.variance) and not torch.equal(model.pca.variance, torch.ones(4))


def test_weights_that_were_removed_are_made_again(tmp_path):
    first = run(COARSE, tmp_path)
    (COARSE.folder(tmp_path) / "model.safetensors").unlink()
    assert run(COARSE, tmp_path) == {**first, **{k: v for k, v in recorded(COARSE, tmp_path).items() if k in TIMES}}
    assert weights_hash(load_model(COARSE.folder(tmp_path) / "model.safetensors")) == first["weights_hash"]


def test_measurements_of_other_weights_are_not_taken_over(tmp_path, monkeypatch):
    "On another machine the same entry ends with slightly other weights: a record must not mix the two."
    first = run(COARSE, tmp_path)
    write_record(tmp_path, {**first, "weights_hash": "other"})
    folder = COARSE.folder(tmp_path)
    (folder / "measured.json").unlink()
    (folder / "model.safetensors").unlink()
    measured = spy(monkeypatch, runs, "evaluate")
    record = run(COARSE, tmp_path)
    assert len(measured) == len(COARSE.evaluations) == len(record["evaluations"])
    assert record["weights_hash"] == first["weights_hash"]


def test_evaluations_without_todays_metrics_are_made_again(tmp_path, monkeypatch):
    "As if one of two had been made before a metric was added: that one is measured again, and nothing is trained."
    first = run(COARSE, tmp_path)
    old = json.loads(json.dumps(first))
    for name in ("texture distance", "texture distance to training set"):
        del old["evaluations"][0]["metrics"][name]
    write_record(tmp_path, old)
    measured = COARSE.folder(tmp_path) / "measured.json"
    known = {**read_json(measured, "evaluations"), "evaluations": old["evaluations"]}
    measured.write_text(json.dumps(sealed(known)))
    assert COARSE.missing(old) == [] and outdated(old) and not outdated(first)
    calls, trained = spy(monkeypatch, runs, "evaluate"), spy(monkeypatch, runs, "train")
    assert run_campaign([COARSE], tmp_path, cpu=True, progress=False) == [] and not calls  # recorded is recorded
    again = run_campaign([NETWORK, COARSE], tmp_path, cpu=True, progress=False, only="measure")[0]
    assert len(calls) == 1 and not trained and not outdated(again)
    assert [e["metrics"] for e in again["evaluations"]] == [e["metrics"] for e in first["evaluations"]]


def test_what_the_metrics_saw_of_each_image_is_kept(tmp_path):
    record = run(COARSE, tmp_path)
    files = sorted(COARSE.folder(tmp_path).glob("features-*.npz"))
    assert len(files) == len(COARSE.evaluations) and not list(COARSE.folder(tmp_path).glob("images-*"))
    kept, test = [np.load(file) for file in files], data.load_data("shapes", "test")
    network = load_features("shapes")
    reference = describe(network, test)
    assert all(k["texture"].shape == (20, 27) and k["shapes"].dtype == np.float16 for k in kept)
    found = {round(frechet_distance(torch.from_numpy(k["shapes"]), reference.features), 1) for k in kept}
    assert found == {round(e["metrics"]["FD (shapes)"]["value"], 1) for e in record["evaluations"]}


def measuring(source, folder):
    "The network that measures an entry whose feature network is `source`."
    entry = dataclasses.replace(COARSE, dataset=source.dataset, features=source.experiment)
    job = runs._Job([source, entry], folder, runs.Clock(None), True, False)
    return job.measuring(entry, torch.device("cpu"))


def test_a_shipped_feature_network_of_that_config_measures_and_nothing_is_trained(whole):
    assert shipped_features("shapes") and not (whole[0] / "shapes" / "features").exists()


def test_a_feature_network_of_another_config_or_name_is_trained(tmp_path):
    small = {"kimg": 0.032, "batch_size": 16}
    for i, change in enumerate([{"width": 4}, {"name": "unheard-of"}]):
        source = dataclasses.replace(NETWORK, model={**NETWORK.model, **change}, train=small)
        [network] = measuring(source, tmp_path / str(i))
        kept = load_model(source.folder(tmp_path / str(i)) / "model.safetensors")
        assert weights_hash(network) == weights_hash(kept) and network.config == build_model(source.model).config
        for value in kept.state_dict().values():  # rounded as it would be shipped
            assert not value.is_floating_point() or torch.equal(value, value.half().float())


def test_a_shipped_encoder_without_its_projection_head_is_the_one_of_the_entry(tmp_path, monkeypatch):
    model = {"model": "FaceEncoder", "name": "faces", "image_size": 32, "channels": [8, 8], "blocks": 1,
             "projection": 16}
    monkeypatch.setenv("HYBRIDVAE_WEIGHTS", str(tmp_path / "weights"))
    slim = FaceEncoder.from_config(model).slim()
    save_model(slim, tmp_path / "weights" / "faces-features.safetensors", torch.float16)
    source = dataclasses.replace(NETWORK, model=model, train={"kimg": 0.032, "batch_size": 16})
    [network] = measuring(source, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert weights_hash(network) == weights_hash(load_model(tmp_path / "weights" / "faces-features.safetensors"))
    [trained] = measuring(dataclasses.replace(source, model={**model, "blocks": 2}), tmp_path / "runs")
    assert (tmp_path / "runs").exists() and trained.config["projection"] == 0  # measured with what would be shipped


class InceptionStub(torch.nn.Module):
    "Has Inception's name and interface, and nothing else of it."
    name, num_features, classes = "inception", 6, 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head = torch.nn.Linear(3, 6), torch.nn.Linear(6, 4)

    def forward(self, images):
        return self.features(images.float().mean(dim=(2, 3)) / 255)

    def logits(self, images):
        return self.head(self(images))


def test_inception_adds_its_metrics_beside_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_INCEPTION", "somewhere.pth")
    monkeypatch.setattr(runs, "load_inception", lambda device: InceptionStub().to(device))
    metrics = run(COARSE, tmp_path)["evaluations"][0]["metrics"]
    assert {"FID", "FID to held-out", "KID", "FD (shapes)", "FD (shapes) to training set",
            "KID (shapes)"} <= set(metrics)
    assert {metrics[k]["feature_network"] for k in ("FID", "KID")} == {"inception"}
    assert metrics["FID"]["hash"] == weights_hash(InceptionStub()) != metrics["FD (shapes)"]["hash"]
    assert "training set" in metrics["FID"]["reference"] and "held-out" in metrics["FD (shapes)"]["reference"]


# --- damaged files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config_hash": 1', ""])
@pytest.mark.parametrize("name", ["trained.json", "measured.json", "../seed0.json"])
def test_a_damaged_file_is_named_in_one_sentence(whole, tmp_path, name, text):
    folder = HYBRID.folder(tmp_path)
    for source in HYBRID.folder(whole[0]).glob("*.*"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / source.name).write_bytes(source.read_bytes())
    path = (folder / name).resolve()
    path.write_text(text)
    with complains(path, "remove it"):
        run(HYBRID, tmp_path)
    assert path.read_text() == text


# --- evaluation -----------------------------------------------------------------------------------------------------

class Camera(Model):
    "Keeps the options it is asked to sample with; its images are noise."

    def __init__(self):
        super().__init__()
        self.config, self.asked, self.image_shape = {"model": "Camera"}, [], (3, 32, 32)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def sample(self, n, *, generator=None, **options):
        self.asked.append((n, options))
        return randn((n, 3, 32, 32), generator)


@pytest.fixture(scope="module")
def eye():
    network = load_features("shapes")
    return network, {"held-out": describe(network, torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8,
                                                                 generator=generator()))}


def look(model, eye, evaluation, **options):
    return evaluate(model, [eye[0]], [eye[1]], evaluation, progress=False, precision="fp32", **options)


def test_samples_come_in_whole_batches_and_their_surplus_is_not_measured(eye, monkeypatch):
    model, checks, seen = Camera(), [], []
    add = runs.ImageStatistics.add
    monkeypatch.setattr(runs.ImageStatistics, "add", lambda self, images: seen.append(len(images)) or add(self, images))
    found = look(model, eye, {"sampler": "ddim", "steps": 3, "n": 25, "eta": 0.5}, batch=10,
                 check=lambda: checks.append(1))
    assert model.asked == [(10, {"sampler": "ddim", "steps": 3, "eta": 0.5})] * 3 and len(checks) == 3
    assert seen == [10, 10, 5] and (found["n"], found["nfe"], found["batch"]) == (25, 3, 10)


def test_an_evaluation_follows_its_seed(eye):
    metrics = lambda seed: look(Camera(), eye, {"sampler": "ddim", "steps": 1, "n": 20}, batch=10, seed=seed)["metrics"]
    assert metrics(0) == metrics(0) != metrics(1)


def test_options_reach_the_model_and_the_prior_is_fitted(monkeypatch, tmp_path):
    asked = []
    plain = VAE.sample
    monkeypatch.setattr(VAE, "sample", lambda self, n, **options: asked.append(options.get("prior"))
                        or plain(self, n, **options))
    run(COARSE, tmp_path)
    fitted = [type(prior).__name__ for prior in asked]
    assert fitted[:4] == ["NoneType", "NoneType", "GaussianMixture", "GaussianMixture"]  # 20 images, 12 at a time
    weights = []
    guided = DiffuseVAE.guided
    monkeypatch.setattr(DiffuseVAE, "guided", lambda self, x_hat, z, weight:
                        weights.append(weight) or guided(self, x_hat, z, weight))
    run(HYBRID, tmp_path)
    assert weights[:3] == [1.0, 1.0, 2.0] and set(weights[3:]) == {1.0}  # studies and pictures are not guided


def test_an_option_that_reports_what_it_did_is_heard(eye):
    class Told:
        def report(self):
            return {"nfe": 1.5, "mean_strength": 0.25}
    evaluation = {"sampler": "ddim", "steps": 3, "n": 8, "strength": [0.0, 0.5]}
    found = look(Camera(), eye, evaluation, options={"sampler": "ddim", "steps": 3, "adaptation": Told()}, batch=8)
    assert (found["nfe"], found["mean_strength"], found["strength"]) == (1.5, 0.25, [0.0, 0.5])
    assert look(Camera(), eye, {"sampler": "ddim", "steps": 3, "n": 8}, batch=8)["nfe"] == 3


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0, 2.0])
def test_nfe_counts_the_networks_evaluations(eye, weight):
    model, calls = build_model(HYBRID.model).eval(), []
    model.unet.register_forward_hook(lambda *args: calls.append(1))
    evaluation = {"sampler": "dpmpp", "steps": 3, "n": 8} | ({} if weight is None else {"guidance_weight": weight})
    assert look(model, eye, evaluation, batch=8)["nfe"] == len(calls) == (6 if weight in (0.5, 2.0) else 3)
    assert look(Camera(), eye, {"sampler": None, "steps": 1, "n": 8}, batch=8)["nfe"] == 0  # one shot


@pytest.mark.parametrize("kind", ["DDPM", "DiffuseVAE"])
def test_a_model_says_what_its_samples_cost(kind):
    "Guided steps evaluate the network twice, but for weights 0 and 1; other options change nothing."
    model = build_model({"model": "DDPM", "unet": TINY_UNET} if kind == "DDPM" else HYBRID.model)
    assert [model.nfe(7, w) for w in (0, 0.0, 1, 1.0)] == [7] * 4 and [
        model.nfe(7, w) for w in (0.5, -1.0, 2, 4.0)
    ] == [14] * 4
    assert model.nfe(steps=7) == model.nfe(steps=7, sampler="ddim", eta=0.5, prior="ex-pde") == 7
    assert model.nfe(sampler="dpmpp", steps=3, guidance_weight=1.5) == 6


class Costly(Camera):
    "A generator that counts in its own way."

    def nfe(self, steps, extra=0, **options):
        return 100 * steps + extra


def test_an_evaluation_counts_as_the_model_does(eye):
    assert look(Costly(), eye, {"sampler": "ddim", "steps": 3, "n": 8}, batch=8)["nfe"] == 300
    assert look(Costly(), eye, {"sampler": "ddim", "steps": 3, "n": 8},
                options={"sampler": "ddim", "steps": 3, "extra": 5}, batch=8)["nfe"] == 305


# --- what a model measures before it is trained ---------------------------------------------------------------------

class Measured(Model):
    "A VAE of a kind: before training it measures the mean image; then it learns one number."

    calls: list = []  # of `prepare`, of all models of this class

    def __init__(self):
        super().__init__()
        self.config, self.shift = {"model": "Measured"}, torch.nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(3, 32, 32))

    def prepare(self, data):
        self.calls.append((data, self.training, self.shift.item()))
        self.mean.copy_(data.float().mean(dim=0))

    def training_loss(self, x, y=None, *, draws=None):
        assert self.mean.abs().max() > 0  # it was measured before the first step
        return {"loss": (x - self.mean - self.shift).square().mean()}


MEASURED = Entry("measured", "shapes", {"model": "Measured"}, TRAIN)


def test_a_model_measures_its_training_images_once_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(Measured, "calls", [])
    images = data.load_data("shapes", "train")
    model = Measured()
    training.train(model, images, training.TrainConfig(**TRAIN), tmp_path, cpu=True, progress=False)
    assert (
        len(Measured.calls) == 1 and Measured.calls[0][0] is images and Measured.calls[0][2] == 1
    )  # before the first step
    torch.testing.assert_close(model.mean, images.float().mean(dim=0))
    assert model.shift.item() != 1


def test_what_was_measured_before_training_is_in_the_checkpoint_and_is_not_measured_again(monkeypatch, tmp_path):
    "Stopped after every step; later parts of the run must not measure again."
    monkeypatch.setattr(Measured, "calls", [])
    images, config = data.load_data("shapes", "train"), training.TrainConfig(**TRAIN)
    mean = images.float().mean(dim=0)
    for step in (1, 2, 3):
        model = Measured()
        result = training.train(model, images, config, tmp_path, minutes=0, cpu=True, progress=False)
        assert (result.step, result.finished, len(Measured.calls)) == (step, step == 3, 1)
        torch.testing.assert_close(model.mean, mean)
        checkpoint = load_model(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        torch.testing.assert_close(checkpoint.mean, mean)
    again = Measured()  # finished: continued once more, nothing is done
    training.train(again, images, config, tmp_path, cpu=True, progress=False)
    torch.testing.assert_close(again.mean, mean)
    assert len(Measured.calls) == 1


def test_an_entry_that_is_stopped_after_every_step_is_prepared_once_and_ends_with_the_same_weights(
    monkeypatch, tmp_path
):
    ends, stops = {}, []
    for name, minutes in (("whole", None), ("parts", 1e-9)):  # too short for a second step
        monkeypatch.setattr(Measured, "calls", [])
        while name not in ends:
            job = runs._Job([MEASURED], tmp_path / name, runs.Clock(60), cpu=True, progress=False)
            monkeypatch.setattr(job.clock, "left", lambda minutes=minutes: minutes)
            try:
                ends[name] = weights_hash(job.train(MEASURED)[0])
            except runs.TimeUp:
                stops.append(name)
        assert len(Measured.calls) == 1
    assert ends["whole"] == ends["parts"] and stops == ["parts", "parts"]  # of three steps


# --- what studies are given -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [None, 3])
def test_a_study_is_told_its_images_batch_and_steps_by_the_entry(tmp_path, monkeypatch, steps):
    told = []
    monkeypatch.setitem(runs.STUDIES, "steps", lambda model, m: told.append((m.n, m.batch, m.seed, m.steps))
                        or {"n": m.n})
    run(dataclasses.replace(COARSE, evaluations=(), studies=("steps",), n_study=9,
                            **({"steps_study": steps} if steps else {})), tmp_path)
    assert told == [(9, 12, 0, steps or 20)]


def test_the_steps_of_a_study_decide_nothing_about_the_trained_model(whole):
    other = dataclasses.replace(HYBRID, steps_study=3)
    assert other.config == HYBRID.config and other.fits(whole[1])


# --- what tables make of records ------------------------------------------------------------------------------------

def a_record(experiment="a", seed=0, value=1.0, digest="x", model="DDPM"):
    metrics = {"FD (shapes)": {"value": value, "hash": digest, "feature_network": "shapes"},
               "FD (shapes) to training set": {"value": 9.0, "hash": digest, "feature_network": "shapes"}}
    first = {"sampler": None, "steps": 1} if model == "VAE" else {"sampler": "dpmpp", "steps": 20}
    few = [{**first, "n": 50, "prior": "ex-pde", "nfe": 20, "seconds_per_image": 0.1, "metrics": metrics}]
    return {"experiment": experiment, "dataset": "shapes", "seed": seed, "config": {"model": {"model": model}},
            "evaluations": [{**first, "n": 100, "nfe": 20, "seconds_per_image": 0.5, "metrics": metrics}, *few]}


def test_an_evaluation_is_found_by_exactly_its_options():
    record = a_record()
    main, few = record["evaluations"]
    assert evaluation_of(record, sampler="dpmpp", steps=20, n=100) is main
    assert evaluation_of(record, sampler="dpmpp", steps=20, n=50, prior="ex-pde") is few
    for asked in (dict(sampler="ddim", steps=20, n=100), dict(sampler="dpmpp", steps=20, n=50),
                  dict(sampler="dpmpp", steps=20)):
        assert evaluation_of(record, **asked) is None


def test_values_come_by_seed_of_the_main_evaluation_or_of_the_one_asked_for():
    records = [a_record(seed=2, value=3.0), a_record(seed=0, value=1.0), a_record(seed=1, value=2.0), a_record("b"),
               a_record("c", model="VAE")]
    assert list(values_of(records, "a").items()) == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert values_of(records, "a", "FD (shapes)",
                     n=100) == values_of(records, "a", n=50, prior="ex-pde") == values_of(records, "a")
    assert values_of(records, "a", "FD (shapes) to training set") == {0: 9.0, 1: 9.0, 2: 9.0}
    assert values_of(records, "c", "nfe") == {0: 20}
    assert values_of(records, "a", "FID") == values_of(records, "d") == values_of(records, "a", n=50) == {}
    assert values_of([a_record() | {"evaluations": []}], "a") == {}
    plain = a_record()["evaluations"][0]
    fitted = plain | {"prior": "ex-pde", "metrics": {"FD (shapes)": {"value": 7.0}}}
    both = [a_record() | {"experiment": "a", "evaluations": [fitted, plain]}]
    value = plain["metrics"]["FD (shapes)"]["value"]
    assert values_of(both, "a") == {0: 7.0} and values_of(both, "a", prior=None) == {0: value}


def test_the_answers_of_a_study_come_by_seed():
    records = [a_record(seed=1) | {"noise": {"n": 3}}, a_record(seed=0), a_record("b") | {"noise": {"n": 4}}]
    assert answers_of(records, "a", "noise") == {1: {"n": 3}}


def test_what_has_no_record_is_one_sentence_however_many_data_sets():
    assert no_record("cifar10").data == (
        "**There is no record on cifar10 yet.** `hybridvae campaign --dataset cifar10` makes them.")
    assert no_record("cifar10", "celeba64").data == (
        "**There is no record on cifar10, celeba64 yet.** `hybridvae campaign --dataset NAME` makes them.")
    assert no_record().data == ""


def test_a_record_without_todays_metrics_is_outdated():
    today = a_record()
    for evaluation in today["evaluations"]:
        evaluation["metrics"] = evaluation["metrics"] | {"texture distance": {}, "high-frequency power": {}}
    assert not outdated(today) and outdated(a_record()) and not outdated({"evaluations": [{"metrics": {}}]})
    assert outdated({"evaluations": [], "floors": {"n": 2_000}}) and not outdated(
        {"evaluations": [], "floors": {"2000": {}}}
    )


def test_the_floor_is_that_of_the_same_n(monkeypatch):
    real = {"train to held-out": {"FD (shapes)": 0.5, "texture distance": 0.25}}
    record = {"dataset": "shapes", "experiment": "features", "seed": 0, "floors": {"100": real}, "evaluations": []}
    monkeypatch.setattr(records, "all_records", lambda dataset: [record] if dataset == "shapes" else [])
    assert floor_of("shapes", 100) == real["train to held-out"]
    assert floor_of("shapes", 200) is None is floor_of("cifar10", 100)
    table = results_table([a_record()])
    assert table.loc["floor: real images", "FD (shapes)"] == "0.50" and "texture distance" not in table
    other = a_record("b")
    other["evaluations"][0]["n"] = 200  # nobody measured the floor of this n
    table = results_table([a_record(), other])
    assert [row for row in table.index if "floor" in row] == ["floor: real images, n = 100"]


def test_one_seed_is_shown_with_the_deviation_over_its_images(monkeypatch):
    monkeypatch.setattr(records, "all_records", lambda dataset: [])
    one = a_record(value=2.0)
    one["evaluations"][0]["metrics"] = {
        "FD (shapes)": one["evaluations"][0]["metrics"]["FD (shapes)"] | {"deviation": 0.126}
    }
    assert results_table([one]).loc["a", "FD (shapes)"] == "2.00 (± 0.13)"


def test_a_table_has_one_row_for_each_experiment_and_refuses_two_kinds_of_eyes(monkeypatch):
    times = [{"experiment": "b", "evaluation": {"sampler": "dpmpp", "steps": 20}, "seconds_per_image": 0.25}]
    monkeypatch.setattr(records, "sampling_times", lambda dataset: times if dataset == "shapes" else [])
    several = [a_record(seed=s, value=v) for s, v in enumerate((1.0, 2.0, 6.0))] + [a_record("b", value=4.0)]
    table = results_table(several)
    assert list(table.index) == ["a", "b"] and list(table["seeds"]) == [3, 1]
    assert (
        table.loc["a", "FD (shapes)"] == f"3.00 ± {np.std([1, 2, 6], ddof=1):.2f}"
        and table.loc["b", "FD (shapes)"] == "4.00"
    )
    assert "FD (shapes) to training set" not in table and list(table["ms per image"]) == ["", "250.00"]
    assert "ms per image" not in results_table(several[:3])
    with complains("records of a", "different feature networks"):
        results_table([a_record(), a_record(seed=1, digest="y")])


def test_means_and_spreads_of_lists_and_of_values_by_seed():
    assert (
        mean_and_spread([1234.5]) == "1,234.50"
        and mean_and_spread([1.0, 3.0], 1) == f"2.0 ± {np.std([1, 3], ddof=1):.1f}"
    )
    assert mean_and_spread({4: 1.0, 7: 3.0}) == mean_and_spread([1.0, 3.0])


def test_a_failed_training_leaves_no_record(tmp_path, monkeypatch):
    terms = VAE.terms_of
    monkeypatch.setattr(
        VAE, "terms_of", lambda self, *args: {k: v * float("nan") for k, v in terms(self, *args).items()}
    )
    with pytest.raises(HybridVAEError, match="not finite"):
        run(COARSE, tmp_path)
    assert not list(tmp_path.glob("*/*/seed*.json"))


def test_an_evaluation_that_was_killed_goes_on_with_the_images_it_has(whole, tmp_path, monkeypatch):
    "Killed in its second batch: the first is not drawn again, the record is the same, and the images are removed."
    folder, record = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("seed0.json", "seed0/measured.json"):
        (tmp_path / "shapes" / "hybrid" / name).unlink()
    drawn, sample = [], DiffuseVAE.sample

    def dies(self, n, **options):
        drawn.append(n)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return sample(self, n, **options)
    monkeypatch.setattr(DiffuseVAE, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        run(HYBRID, tmp_path)
    kept = list(tmp_path.glob("shapes/hybrid/seed0/images-*/*.npz"))
    assert [path.name for path in kept] == ["0.npz"]
    drawn.extend([0] * 2)
    assert results(run(HYBRID, tmp_path)) == results(record)
    assert drawn[4:].count(12) == 2  # the second batch, and that of the other evaluation
    assert not list(tmp_path.glob("shapes/hybrid/seed0/images-*"))


def test_weights_in_half_precision_are_what_is_kept_and_measured(tmp_path):
    entry = dataclasses.replace(COARSE, half=True)
    record = run(entry, tmp_path, entries=[NETWORK, entry])
    file = entry.folder(tmp_path) / "model.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    assert weights_hash(load_model(file)) == record["weights_hash"] and record["config"]["half"] is True
    assert "half" not in COARSE.config and config_hash(entry.config) != config_hash(COARSE.config)


def test_training_alone_leaves_weights_and_no_record(tmp_path):
    assert run_entry(COARSE, ENTRIES, tmp_path, cpu=True, progress=False, train_only=True) is None
    assert (COARSE.folder(tmp_path) / "trained.json").exists() and not list(tmp_path.glob("*/*/seed*.json"))
    assert results(run(COARSE, tmp_path)) == results(run(COARSE, tmp_path / "at once"))


# --- several processes ----------------------------------------------------------------------------------------------

SHARED = """
import os, sys
from pathlib import Path
from hybridvae import campaign, data, records, runs
from hybridvae.entries import Entry

data.SHAPES_SIZES.update(train=96, test=64)
campaign.record_roots = list
SIZE = {"image_size": 32, "width": 8, "multipliers": [1], "patch": 4}
VAE = {"model": "VAE", "z_dim": 4, **SIZE}
PAIR = {"model": "DiffuseVAE", "vae": VAE, "form": 1, "unet": SIZE | {"attention": []},
        "diffusion": {"schedule": "cosine"}}
TRAIN = {"kimg": 0.064, "batch_size": 8}
MANY = {"sampler": "dpmpp", "steps": 2, "n": 110, "prior": "ex-pde"}  # four batches, the last one not full
entries = [Entry("features", "shapes", {"model": "FeatureNetwork", "name": "tiny", "width": 4}, TRAIN),
           Entry("vae", "shapes", VAE, TRAIN),
           Entry("pair", "shapes", PAIR, TRAIN, depends_on={"vae": "vae"}, features="features", batch=30, n_study=20,
                 evaluations=(MANY, MANY | {"steps": 1}), studies=("condition_agreement",))]
campaign.run_campaign(entries, sys.argv[1], cpu=True, progress=False)
if "RANK" in os.environ:  # and then a folder that is in use
    from hybridvae.core import InUse
    def refuse(folder):
        raise InUse("the folder is in use by another process.")
    runs.sole_use = refuse
    try:
        runs.run_entry(entries[1], entries, sys.argv[1] + "-refused", cpu=True, progress=False)
    except InUse:
        Path(sys.argv[1] + os.environ["RANK"]).touch()
"""


def with_processes(n, folder):
    "Run `SHARED` with n processes."
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    script = folder.with_suffix(".py")
    script.write_text(SHARED)
    paths = os.pathsep.join([str(Path(runs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *launcher, str(script), str(folder)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_measure_and_record_as_one(tmp_path, monkeypatch):
    """Each draws and measures its part of the batches; the record is written once, with the same metrics.

    Both are told that a folder is in use, though only the first asks for it.
    """
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "fp32")  # in bf16 other batches round otherwise, by images on an edge
    said = with_processes(1, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    pair = tmp_path / "two" / "shapes" / "pair"
    (pair / "seed0.json").unlink()  # to be measured again
    (pair / "seed0" / "measured.json").unlink()
    for name in ("vae", "features"):  # to be trained again
        shutil.rmtree(tmp_path / "two" / "shapes" / name)
    assert said.count("recorded: ") == 3
    assert with_processes(2, tmp_path / "two").count("recorded: ") == 3
    one, two = (json.loads((tmp_path / run / "shapes" / "pair" / "seed0.json").read_text()) for run in ("one", "two"))
    assert one["weights_hash"] == two["weights_hash"] and one["condition_agreement"] == two["condition_agreement"]
    assert [e["steps"] for e in two["evaluations"]] == [2, 1]
    for a, b in zip(one["evaluations"], two["evaluations"]):
        assert a["metrics"].keys() == b["metrics"].keys() and len(a["metrics"]) > 5
        for name, metric in a["metrics"].items():
            assert b["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-6), name
    assert not list(tmp_path.glob("two/shapes/pair/seed0/images-*"))
    assert {path.name for path in tmp_path.glob("two?")} == {"two0", "two1"}
