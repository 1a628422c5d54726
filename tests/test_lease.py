"""The script for ten minutes of a borrowed GPU, tried on the CPU: lanes, the limit, what is packed, what follows."""
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hybridvae.campaign import queue, run_campaign, shrink, stand_in_data, state
from hybridvae.core import load_model, weights_hash

SCRIPT = Path(__file__).with_name("lease.py")


def lease(*words):
    "What the script prints."
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HYBRIDVAE_PRECISION": "fp32"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def unpacked(out, folder):
    "The parts put together and unpacked, as at home."
    whole = folder / "whole.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in sorted(out.glob("lease.tar.*"))))
    with tarfile.open(whole) as archive:
        archive.extractall(folder / "runs", filter="data")
    return folder / "runs"


@pytest.mark.parametrize("dataset", ["cifar10", "celeba64"])
def test_a_lease_brings_home_records_grids_and_the_weights_that_were_measured(dataset, tmp_path):
    said = lease("run", dataset, "--tiny", "--runs", tmp_path / "there", "--out", tmp_path / "out",
                 "diffusevae-form1-z ddpm", "features vae!")
    assert "the lanes ended with [0, 0]" in said
    assert said.index("vae seed 0 trained") < said.index("diffusevae-form1-z seed 0 trained")
    runs = unpacked(tmp_path / "out", tmp_path)
    for name in ("features", "vae", "diffusevae-form1-z", "ddpm"):
        entry = next(shrink(e) for e in queue(dataset) if (e.experiment, e.seed) == (name, 0))
        assert state(entry, runs) == "recorded"
        record = json.loads((runs / dataset / name / "seed0.json").read_text())
        assert weights_hash(load_model(runs / dataset / name / "seed0" / "model.safetensors")) == record["weights_hash"]
        assert len(list((runs / dataset / name).glob("seed0*.*g"))) == (
            0 if name == "features" else 1 + ("form" in name) * (1 + ("path_length" in entry.studies))
        )
    assert not list(runs.rglob("checkpoint-*"))


def test_what_the_limit_cut_off_is_measured_at_home(tmp_path, monkeypatch):
    "Here the limit comes before anything is measured: only weights come home, and the campaign measures them."
    monkeypatch.setenv("HYBRIDVAE_PRECISION", "fp32")
    there = str(tmp_path / "there")
    script = f"import runpy, sys; sys.argv = ['lease.py', 'lane', 'cifar10', 'vae', '--tiny', '--runs', {there!r}]\n"
    stopped = (
        "import hybridvae.runs as runs\nrun = runs.run_entry\nruns.run_entry = lambda *a: run(*a) if a[-1] else None\n"
    )
    subprocess.run([sys.executable, "-c", stopped + script + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"],
                   check=True,
                   capture_output=True)
    sys.path.insert(0, str(SCRIPT.parent))
    from lease import pack, send
    pack(tmp_path / "there")
    send(tmp_path / "there", tmp_path / "out")
    runs = unpacked(tmp_path / "out", tmp_path)
    pool = [shrink(e) for e in queue("cifar10") if e.experiment in ("vae", "features") and e.seed == 0]
    assert state(pool[1], runs) == "trained"
    with stand_in_data():
        assert [r["experiment"] for r in run_campaign(pool, runs, cpu=True, progress=False, only="measure")] == ["vae"]
        assert [r["experiment"] for r in run_campaign(pool, runs, cpu=True, progress=False)] == ["features"]


def test_a_lane_that_does_not_end_is_ended_and_the_rest_is_packed(tmp_path, monkeypatch):
    "A lane may fit a prior, or compile, and not look at the clock."
    sys.path.insert(0, str(SCRIPT.parent))
    import lease as script
    file = tmp_path / "there" / "cifar10" / "vae" / "seed0" / "trained.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    start = subprocess.Popen
    monkeypatch.setattr(script.subprocess, "Popen",
                        lambda command: start(["sleep", "100" if command[-1] == "slow" else "0"]))
    monkeypatch.setattr(script, "GRACE", 0.2)
    began = time.monotonic()
    script.run("cifar10", ["slow", "quick"], False, tmp_path / "there", 0.0, tmp_path / "out")
    assert (
        time.monotonic() - began < 20
        and (unpacked(tmp_path / "out", tmp_path) / "cifar10/vae/seed0/trained.json").exists()
    )


def test_a_package_is_cut_into_parts_that_fit(tmp_path, monkeypatch):
    sys.path.insert(0, str(SCRIPT.parent))
    import lease as script
    folder = tmp_path / "there" / "cifar10" / "vae" / "seed0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state.safetensors").write_bytes(b"x")
    monkeypatch.setattr(script, "PART", 25_000)
    parts = script.pack(tmp_path / "there")
    assert 4 < len(parts) <= 8 and all(p.stat().st_size <= 25_000 for p in parts)
    assert [p.name for p in script.send(tmp_path / "there", tmp_path / "out")] == [p.name for p in parts[:4]]
    assert [p.name for p in script.send(tmp_path / "there", tmp_path / "out", 4)] == [p.name for p in parts[4:]]
    assert [p.relative_to(tmp_path / "runs").as_posix() for p in unpacked(tmp_path / "out", tmp_path).rglob("*.*")] == [
        "cifar10/vae/seed0/model.safetensors"]


def test_the_probe_says_how_fast_an_entry_is():
    said = lease("probe", "cifar10", "--tiny", "ddpm", "diffusevae-form1-z")
    assert said.count("trains") == said.count("samples") == 2 and "% of the peak" in said


@pytest.mark.parametrize("before, left_out", [((1e12, 50.0), False), ((1e15, 50.0), True), ((1e15, 1.0), False)])
def test_an_entry_is_left_out_only_where_one_of_its_size_took_longer_than_is_left(before, left_out, tmp_path,
                                                                                  monkeypatch, capsys):
    "A VAE's training, most of it compilation, once kept a U-Net from being trained."
    sys.path.insert(0, str(SCRIPT.parent))
    import lease as script
    monkeypatch.setattr(script, "training_operations", lambda entry: 2e15)
    lane = script.Lane("cifar10", ["ddpm"], ["ddpm"], True, tmp_path, 1.5)
    trained = []
    monkeypatch.setattr(lane, "run", lambda entry, train_only: trained.append(entry.experiment))
    lane.before = before
    lane.train(lane.chosen[0])
    assert trained == ([] if left_out else ["ddpm"]) and ("left out" in capsys.readouterr().out) == left_out
