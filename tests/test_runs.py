"""Entries, records and the command line: tiny runs of the real thing, and every kind of bad input."""
import copy
import dataclasses
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from hybridvae import core, data, diffusevae, runs
from hybridvae.cli import app, main, read_bibliography, render_report, resolve_references
from hybridvae.core import RECORD_KEYS, HybridVAEError, load_model, weights_hash

TINY_VAE = {"image_size": 32, "z_dim": 4, "width": 8, "multipliers": [1, 2], "patch": 4}
TINY_UNET = {"image_size": 32, "width": 16, "multipliers": [1], "attention": [], "patch": 4}
TINY_TRAIN = {"kimg": 0.128, "batch_size": 32, "lr": 1e-3}


@pytest.fixture
def tiny(monkeypatch):
    "All presets at a size that trains in a second, on few images."
    presets = copy.deepcopy(core.PRESETS)
    for preset in presets.values():
        preset.update(vae=TINY_VAE, unet=TINY_UNET, n=300, train=TINY_TRAIN, train_vae=TINY_TRAIN, train_features=TINY_TRAIN)
    presets["cifar10-cpu"]["subset"] = 200
    monkeypatch.setattr(diffusevae, "PRESETS", presets)
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 400, "test": 300})


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A cache with a CIFAR-10 of 300 + 300 random images."
    root = tmp_path / "data"
    (root / "cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(root / "cifar10" / f"{split}_images.npy", rng.integers(0, 256, (300, 32, 32, 3), np.uint8))
        np.save(root / "cifar10" / f"{split}_labels.npy", rng.integers(0, 10, 300).astype(np.uint8))
    monkeypatch.setenv("HYBRIDVAE_DATA", str(root))
    return root


def command(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def sentence(capsys, monkeypatch, *words):
    "What the installed command says on the error stream; it must end with status 2."
    monkeypatch.setattr("sys.argv", ["hybridvae", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said


def test_a_run_leaves_record_weights_and_grid(tiny, tmp_path):
    answer = command("run", "--experiment", "diffusevae-form2-z", "--runs", tmp_path, "--cpu")
    assert answer.exit_code == 0, answer.output
    folder = tmp_path / "shapes" / "diffusevae-form2-z"
    record = json.loads((folder / "seed0.json").read_text())
    assert set(RECORD_KEYS) <= set(record)
    vae = load_model(tmp_path / "shapes" / "vae" / "seed0" / "model.safetensors")
    model = load_model(folder / "seed0" / "model.safetensors")
    assert record["depends_on"] == {"vae": weights_hash(vae)}  # the frozen part is that very VAE
    assert weights_hash(model.vae) == weights_hash(vae) and weights_hash(model) == record["weights_hash"]
    [evaluation] = record["evaluations"]
    assert (evaluation["sampler"], evaluation["steps"], evaluation["nfe"], evaluation["n"]) == ("dpmpp", 20, 20, 300)
    assert set(evaluation["metrics"]) == {"FD (shapes)", "FD (shapes) to training set"}
    assert record["condition_agreement"]["n"] == 500 and record["flops_per_image"] > 0
    assert (folder / "seed0.png").read_bytes().startswith(b"\x89PNG")


def test_a_recorded_entry_is_not_run_again_and_a_changed_one_is(tiny, tmp_path):
    entries = diffusevae.experiments("shapes")
    entry = runs.find_entry(entries, "vae")
    first = runs.run_entry(entry, entries, tmp_path, cpu=True, progress=False)
    weights = tmp_path / "shapes" / "vae" / "seed0" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert runs.run_entry(entry, entries, tmp_path, cpu=True, progress=False) == first
    assert weights.stat().st_mtime_ns == written
    changed = dataclasses.replace(entry, train={**entry.train, "lr": 5e-4})
    assert not changed.is_recorded(first)
    more = dataclasses.replace(entry, evaluations=(*entry.evaluations, {"sampler": None, "steps": 1, "n": 50}))
    assert not more.is_recorded(first)  # an evaluation is missing
    with pytest.raises(HybridVAEError, match="another config"):  # and it does not overwrite what is there
        runs.run_entry(changed, entries, tmp_path, cpu=True, progress=False)


def test_the_same_entry_gives_the_same_weights_and_distance(tiny, tmp_path):
    entries = diffusevae.experiments("shapes")
    entry = runs.find_entry(entries, "ddpm", seed=1)
    a, b = (runs.run_entry(entry, entries, tmp_path / k, cpu=True, progress=False) for k in "ab")
    assert a["weights_hash"] == b["weights_hash"]
    assert a["evaluations"][0]["metrics"] == b["evaluations"][0]["metrics"]
    other = runs.run_entry(runs.find_entry(entries, "ddpm", seed=2), entries, tmp_path / "a", cpu=True, progress=False)
    assert other["weights_hash"] != a["weights_hash"]


def test_a_run_stopped_by_its_limit_is_continued(tiny, tmp_path):
    arguments = ("run", "--experiment", "ddpm", "--runs", tmp_path, "--cpu")
    answer = command(*arguments, "--minutes", 0)
    assert answer.exit_code == 0 and "the same command continues" in answer.output
    assert not list(tmp_path.glob("*/*/seed0.json"))  # no record of an unfinished run
    assert command(*arguments).exit_code == 0
    entries = diffusevae.experiments("shapes")
    whole = runs.run_entry(runs.find_entry(entries, "ddpm"), entries, tmp_path / "whole", cpu=True, progress=False)
    continued = json.loads((tmp_path / "shapes" / "ddpm" / "seed0.json").read_text())
    assert continued["weights_hash"] == whole["weights_hash"]


def test_cifar10_at_cpu_size(tiny, cifar, tmp_path):
    answer = command("run", "--dataset", "cifar10", "--experiment", "diffusevae-form1-cpu", "--runs", tmp_path / "runs", "--cpu")
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "runs" / "cifar10-200" / "diffusevae-form1-cpu" / "seed0.json").read_text())
    assert record["subset"] == 200
    assert set(record["evaluations"][0]["metrics"]) == {"FD (cifar-cpu)", "FD (cifar-cpu) to training set"}


def test_experiments_of_different_names_have_different_configs():
    for dataset in ("shapes", "cifar10"):
        entries = [e for e in diffusevae.experiments(dataset) if e.seed == 0]
        assert len({core.config_hash(e.config) for e in entries}) == len({e.experiment for e in entries}) == len(entries)


def test_data_command(cifar):
    answer = command("data", "cifar10")
    assert answer.exit_code == 0 and "train: 300 images" in answer.output
    assert "4,000 images" in command("data", "shapes").output


def test_bad_input_gets_one_sentence(capsys, monkeypatch, tmp_path):
    say = lambda *words: sentence(capsys, monkeypatch, *words)
    assert re.search(r"'imagenet'.*choose from shapes, cifar10", say("data", "imagenet"))
    assert re.search(r"'imagenet'.*choose from shapes, cifar10", say("run", "--dataset", "imagenet", "--experiment", "vae"))
    assert re.search(r"'gan'.*choose from .*ddpm", say("run", "--experiment", "gan", "--runs", tmp_path))
    assert re.search(r"seed 7", say("run", "--experiment", "vae", "--seed", 7, "--runs", tmp_path))
    (tmp_path / "file").write_text("in the way")
    assert "file" in say("run", "--experiment", "vae", "--runs", tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_damaged_cache_gets_one_sentence(capsys, monkeypatch, cifar):
    path = cifar / "cifar10" / "train_images.npy"
    path.write_bytes(path.read_bytes()[:1000])
    assert "train_images.npy" in sentence(capsys, monkeypatch, "data", "cifar10")


def test_usage_errors_and_help():
    assert command("run", "--nonsense").exit_code == 2
    assert command("run", "--minutes", "soon").exit_code == 2
    for name in ("data", "run", "report"):
        assert "Example: hybridvae" in command(name, "--help").output


def test_report_over_a_fresh_study(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_RUNS", "")  # restored afterwards: the command sets it
    answer = command("report", "--runs", tmp_path, "--cpu")
    assert answer.exit_code == 0, answer.output
    html = (tmp_path / "report" / "report.html").read_text()
    assert answer.output.strip().endswith("report.html")
    text = re.sub(r"<(script|style).*?</\1>|<[^>]+>|data:image[^\"]+", " ", html, flags=re.S)
    assert html.count("data:image/png") >= 3 and "Figure 1" in text and "Kingma" in text
    assert not re.search(r"@(fig|tbl|sec)-|\[@|\{#", text)  # every reference is resolved
    values = json.loads((tmp_path / "shapes" / "vae" / "seed0.json").read_text())["evaluations"][0]["metrics"]
    assert f"{values['FD (shapes)']['value']:,.2f}" in text  # the numbers are this study's


def test_an_unknown_reference_is_an_error():
    import nbformat

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("see @fig-nowhere")])
    with pytest.raises(KeyError):
        resolve_references(nb, {})


def test_the_bibliography_is_read_whole():
    text = (runs.results_folder().parent / "refs.bib").read_text()
    found = read_bibliography(text)
    assert len(found) == len(re.findall(r"^@", text, flags=re.M))
    assert all({"author", "title", "year"} <= set(fields) for fields in found.values())


def test_report_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr("hybridvae.core.project_root", lambda: tmp_path)
    with pytest.raises(HybridVAEError, match="needs a clone"):
        render_report(tmp_path)
