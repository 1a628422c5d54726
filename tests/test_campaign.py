"""The campaign: its queue and states, running and continuing, the dry run, and every model at its real size."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hybridvae
import pytest
import torch
from conftest import complains, generator
from hybridvae import campaign, experiments, runs
from hybridvae.campaign import TINY, dry_run, listing, queue, run_campaign, shrink, stand_in_data, state
from hybridvae.core import (RECORD_KEYS, Draws, build_model, config_hash, count_parameters, record_path,
                            write_record)
from hybridvae.data import load_data
from hybridvae.core import count_flops
from hybridvae.experiments import Row
from hybridvae.entries import Entry
from hybridvae.records import recorded
from hybridvae.training import compile_networks, eager
from hybridvae.unet import UNet

ROOT = Path(__file__).parents[1]
ENTRIES = queue()
OTHER_SIZES = ("celeba64-cpu", "cifar10-cpu", "cifar10-full", "celeba64-full")
TRIALS = "celeba64-trials"
VAE = {"model": "VAE", "image_size": 32, "z_dim": 4, "width": 4, "multipliers": [1, 2], "patch": 4}
UNET = {"image_size": 32, "width": 8, "multipliers": [1], "attention": [], "patch": 4}
TRAIN = {"kimg": 0.032, "batch_size": 8}


def entry(name="vae", seed=0, **changes):
    "A tiny entry that evaluates nothing."
    return Entry(name, "shapes", **{"model": VAE, "train": TRAIN, "seed": seed, **changes})


def a_record(e, **changes):
    "A record of that entry, complete."
    return {**dict.fromkeys(RECORD_KEYS, 0), "experiment": e.experiment, "dataset": e.dataset, "subset": e.subset,
            "seed": e.seed,
            "config": e.config, "config_hash": config_hash(e.config), "evaluations": list(e.evaluations),
            "studied": {name: e.studied(name) for name in e.studies}, **dict.fromkeys(e.studies, 1), **changes}


@pytest.fixture
def committed(monkeypatch, tmp_path):
    "A folder in place of the committed records."
    folder = tmp_path / "committed"
    monkeypatch.setattr(campaign, "record_roots", lambda: [folder])
    return folder


# --- the queue ------------------------------------------------------------------------------------------------------

def test_the_queue_holds_every_entry_once():
    assert {e.dataset for e in ENTRIES} == set(campaign.DATASETS) and not any(e.experiment.endswith(campaign.SIZES)
                                                                              for e in ENTRIES)
    keys = [(e.dataset, e.experiment, e.seed) for e in ENTRIES]
    assert len(set(keys)) == len(keys)
    for data in campaign.DATASETS:
        assert queue(data) == [e for e in ENTRIES if e.dataset == data]
    first = [(e.dataset, e.seed) for e in ENTRIES]
    order = [first.index(key) for key in (("cifar10", 0), ("celeba64", 0), ("cifar10", 1), ("celeba256", 0))]
    assert order == sorted(order)


def test_what_an_entry_needs_comes_before_it():
    for names in (campaign.DATASETS, ("shapes",), *((name,) for name in (*OTHER_SIZES, TRIALS))):
        place = {(e.dataset, e.experiment, e.seed): i for i, e in enumerate(queue(*names))}
        for e in queue(*names):
            needed = [(e.dataset, name, e.seed) for name in e.depends_on.values()]
            needed += [(e.dataset, e.features, 0)] if e.features else []
            assert all(place[key] < place[e.dataset, e.experiment, e.seed] for key in needed), e.experiment


def test_a_data_set_without_entries_is_refused_and_the_known_ones_are_named():
    for name in OTHER_SIZES:  # and the feature network, which all sizes share
        network, *others = queue(name)
        data, _, size = name.partition("-")
        assert (network.experiment, network.dataset, network.seed) == ("features", data, 0)
        assert others and all(e.dataset == data and e.experiment.endswith(f"-{size}") for e in others)
    with complains("'imagenet'", "cifar10", "cifar10-cpu", "shapes"):
        queue("imagenet")


def test_a_new_table_is_queued_and_its_module_imported(tmp_path, monkeypatch):
    (tmp_path / "zz_new_stage.py").write_text("here = True")
    monkeypatch.setattr(hybridvae, "__path__", [*hybridvae.__path__, str(tmp_path)])
    row = Row("new", "vae", on={"cifar10": 1})
    monkeypatch.setitem(experiments.TABLES, "zz_new_stage", (row,))
    try:
        assert [e.experiment for e in queue() if e not in ENTRIES] == ["new"]
        assert sys.modules["hybridvae.zz_new_stage"].here
    finally:
        sys.modules.pop("hybridvae.zz_new_stage", None)
        vars(hybridvae).pop("zz_new_stage", None)


def test_a_fresh_process_knows_every_model_and_study_of_the_queue():
    program = ("from hybridvae.campaign import queue\n"
               "from hybridvae.core import MODELS\n"
               "from hybridvae.runs import STUDIES\n"
               "for e in queue(*dict.fromkeys(e.dataset for e in queue())) + queue('shapes'):\n"
               "    assert e.model['model'] in MODELS and set(e.studies) <= set(STUDIES), e.experiment")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- states ---------------------------------------------------------------------------------------------------------

def test_every_state_of_an_entry_has_its_words(tmp_path, committed):
    e = entry(evaluations=({"sampler": None, "steps": 1, "n": 2000},), studies=("readout",),
              train={"kimg": 0.08, "batch_size": 8})
    own = tmp_path / "runs"
    folder = e.folder(own)
    words = lambda: state(e, own)
    assert words() == "not trained"
    (folder / "checkpoint-4").mkdir(parents=True)
    assert words() == "training, 40%"
    (folder / "trained.json").write_text("{}")
    assert words() == "trained"
    write_record(own, a_record(e, evaluations=[], config={}))
    assert words() == "trained"  # a record of another config says nothing
    (folder / "trained.json").unlink()
    (folder / "checkpoint-4").rmdir()
    assert words() == "not trained: its record has another config"
    record = a_record(e, evaluations=[])
    del record["readout"]
    write_record(own, record)
    assert words() == "lacks one shot 1, n = 2,000; readout"
    write_record(own, a_record(e, studied={"readout": {"n": 1, "steps": 20}}))
    assert words() == "lacks readout, n = 500, 20 steps"
    write_record(own, a_record(e))
    assert words() == "recorded"
    record_path(own, vars(e)).unlink()
    write_record(committed, a_record(e))
    assert words() == "recorded"  # wherever the record is


def test_the_listing_has_one_row_for_each_experiment(tmp_path, committed):
    entries = [entry(), entry(seed=1), entry("other"), entry(subset=50)]
    write_record(committed, a_record(entries[1]))
    rows = listing(entries, tmp_path)
    assert rows == [{"dataset": "shapes", "experiment": "vae", "seed 0": "not trained", "seed 1": "recorded"},
                    {"dataset": "shapes", "experiment": "other", "seed 0": "not trained"},
                    {"dataset": "shapes", "experiment": "vae", "seed 0": "not trained"}]


# --- running --------------------------------------------------------------------------------------------------------

@pytest.fixture
def ran(monkeypatch):
    "Entries that were run by a stub of `run_entry`, which writes their record."
    done = []

    def run_entry(e, entries, runs, minutes, cpu, progress, train_only=False):
        done.append((e.experiment, e.seed))
        if e.experiment == "bad":
            complain = {0: campaign.HybridVAEError("the loss is not finite: lower the rate."),
                        1: RuntimeError("out of\nmemory")}
            raise complain[e.seed]
        if e.experiment == "slow":
            return None
        write_record(runs, a_record(e))
        return a_record(e)
    monkeypatch.setattr(campaign, "run_entry", run_entry)
    return done


def test_what_is_recorded_here_or_committed_is_skipped(tmp_path, committed, ran):
    entries = [entry("a"), entry("b"), entry("c"), entry("d")]
    write_record(committed, a_record(entries[1]))
    write_record(tmp_path / "runs", a_record(entries[2]))
    write_record(committed, a_record(entries[3], config={}))
    found = run_campaign(entries, tmp_path / "runs", progress=False)
    assert [r["experiment"] for r in found] == ["a", "d"] and ran == [("a", 0), ("d", 0)]
    assert run_campaign(entries, tmp_path / "runs", progress=False) == []


def test_entries_that_fail_do_not_hold_up_the_others_and_are_reported(tmp_path, committed, ran, capsys):
    entries = [entry("bad"), entry("a"), entry("bad", seed=1), entry("b")]
    with complains("2 of the campaign's entries failed",
                   "shapes bad seed 0, while it was trained: the loss is not finite"):
        run_campaign(entries, tmp_path, progress=False)
    assert ran == [("bad", 0), ("a", 0), ("bad", 1), ("b", 0)]
    said = capsys.readouterr().out
    assert (
        "recorded: shapes a seed 0" in said
        and "shapes bad seed 1, while it was trained: RuntimeError" in said
        and "memory" in said
    )
    with complains("1 of the campaign's entries failed", "shapes bad seed 1", "RuntimeError"):
        run_campaign(entries[2:], tmp_path, progress=False)


def test_a_failure_says_whether_training_or_measuring_failed(tmp_path, committed, ran):
    bad = entry("bad")
    bad.folder(tmp_path).mkdir(parents=True)
    (bad.folder(tmp_path) / "trained.json").write_text("{}")
    with complains("shapes bad seed 0, while it was measured: the loss"):
        run_campaign([bad], tmp_path, progress=False)


def test_the_campaign_stops_where_an_entry_was_stopped_by_the_limit(tmp_path, committed, ran):
    entries = [entry("a"), entry("slow"), entry("b")]
    assert [r["experiment"] for r in run_campaign(entries, tmp_path, minutes=1, progress=False)] == ["a"]
    assert ran == [("a", 0), ("slow", 0)]


def test_no_entry_is_begun_after_the_limit_and_each_is_given_what_is_left(tmp_path, committed, ran, monkeypatch):
    now, given, inner = [0.0], [], campaign.run_entry
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def slow(e, entries, runs, minutes, *rest):
        given.append(minutes)
        now[0] += 120
        return inner(e, entries, runs, minutes, *rest)
    monkeypatch.setattr(campaign, "run_entry", slow)
    entries = [entry(name) for name in "abcd"]
    assert len(run_campaign(entries, tmp_path, minutes=5, progress=False)) == 3 and given == [5.0, 3.0, 1.0]
    assert [r["experiment"] for r in run_campaign(entries, tmp_path, minutes=5, progress=False)] == ["d"]


# --- several workers -----------------------------------------------------------------------------------------------

WORKERS = """
import os, sys, traceback
import torch._dynamo, torch.utils.tensorboard
from hybridvae import campaign, data
from hybridvae.entries import Entry

data.SHAPES_SIZES.update(train=64, test=16)
campaign.record_roots, campaign.WAIT = list, 0.2
VAE = {"model": "VAE", "image_size": 32, "z_dim": 4, "width": 4, "multipliers": [1, 2], "patch": 4}
PAIR = {"model": "DiffuseVAE", "vae": VAE, "form": 1, "unet": {"image_size": 32, "width": 8, "multipliers": [1],
        "attention": [], "patch": 4}, "diffusion": {"schedule": "cosine"}}
TRAIN = {"kimg": 0.128, "batch_size": 8}
entries = [Entry(name, "shapes", model, TRAIN, seed, depends_on=needs) for seed in range(3)
           for name, model, needs in (("vae", VAE, {}), ("pair", PAIR, {"vae": "vae"}))]
while line := sys.stdin.readline().strip():
    folder, workers = line, []
    for i in range(int(sys.stdin.readline())):
        workers.append(os.fork())
        if workers[-1] == 0:
            status = 1
            try:
                sys.stdout = open(f"{folder}.{i}", "w")
                campaign.run_campaign(entries, folder, cpu=True, progress=False)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
    print(*workers, flush=True)
    sys.stdin.readline()
    print(*[os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers], flush=True)
"""


class Workers:
    "Processes that share a campaign of six entries, two for each seed; what they have in common is imported once."

    def __init__(self):
        self.parent = subprocess.Popen([sys.executable, "-c", WORKERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def tell(self, text):
        self.parent.stdin.write(f"{text}\n")
        self.parent.stdin.flush()

    def numbers(self):
        return [int(word) for word in self.parent.stdout.readline().split()]

    def start(self, folder, n):
        "Start n of them; their process numbers, which stay theirs until `ended`."
        self.tell(f"{folder}\n{n}")
        return self.numbers()

    def ended(self):
        "How each ended, when all have."
        self.tell("wait")
        return self.numbers()


@pytest.fixture(scope="module")
def workers():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    group = Workers()
    yield group
    group.parent.communicate()


@pytest.fixture(scope="module")
def alone(workers, tmp_path_factory):
    "What one worker makes."
    folder = tmp_path_factory.mktemp("campaign") / "alone"
    workers.start(folder, 1)
    assert workers.ended() == [0] and said_in(folder, 1).count("recorded: ") == 6
    return folder


def said_in(folder, n):
    return "".join(Path(f"{folder}.{i}").read_text() for i in range(n))


def in_hand(folder):
    "How many entries have been begun."
    return len(list(folder.glob("shapes/*/seed?/.lock")))


def four_of_which_two_are_killed(workers, folder, delay):
    "The lines that four workers say, the first two of which are killed when three entries are begun and `delay` later."
    started, end = workers.start(folder, 4), time.monotonic() + 300
    while in_hand(folder) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(delay)
    for worker in started[:2]:
        os.kill(worker, signal.SIGKILL)
    codes = workers.ended()
    assert codes[2:] == [0, 0] and set(codes[:2]) <= {0, -signal.SIGKILL}, (codes, said_in(folder, 4))
    return said_in(folder, 4).splitlines()


def check_shared(said, folder, alone):
    "Every entry is recorded, by one worker, as one worker alone records it."
    names = [f"shapes {name} seed {seed}" for name in ("vae", "pair") for seed in range(3)]
    recorded = [line.removeprefix("recorded: ") for line in said if line.startswith("recorded: ")]
    assert set(recorded) <= set(names) and len(recorded) == len(set(recorded)), said
    found, wanted = ({r.relative_to(root): json.loads(r.read_text())["weights_hash"]
                      for r in root.glob("shapes/*/seed?.json")} for root in (folder, alone))
    assert len(found) == 6 and found == wanted


def test_four_workers_share_a_campaign_and_two_are_killed(workers, alone, tmp_path):
    check_shared(four_of_which_two_are_killed(workers, tmp_path / "shared", 0.3), tmp_path / "shared", alone)


@pytest.mark.slow
def test_workers_that_are_killed_at_any_moment_lose_nothing(workers, alone, tmp_path):
    for i in range(100):
        folder = tmp_path / f"shared{i}"
        check_shared(four_of_which_two_are_killed(workers, folder, 0.03 * (i % 40)), folder, alone)
        shutil.rmtree(folder)


def test_what_another_process_has_in_hand_is_taken_up_when_it_is_free(tmp_path, committed, monkeypatch, capsys):
    "Twice it is in use, then it runs; the others did not wait for it, and it is said once."
    ran, refused = [], [0]

    def run_entry(e, entries, runs, *rest):
        if e.experiment == "a" and refused[0] < 2:
            refused[0] += 1
            raise campaign.InUse("its folder is in use by another process: wait.")
        ran.append(e.experiment)
        write_record(runs, a_record(e))
        return a_record(e)

    monkeypatch.setattr(campaign, "run_entry", run_entry)
    monkeypatch.setattr(campaign, "WAIT", 0.0)
    found = run_campaign([entry("a"), entry("b"), entry("c")], tmp_path, progress=False)
    assert ran == ["b", "c", "a"] == [r["experiment"] for r in found]
    assert capsys.readouterr().out.count("waiting: shapes a seed 0, since its folder is in use") == 1


# --- the dry run ----------------------------------------------------------------------------------------------------

def leaves(value, path=()):
    "Every number and word of a nested config, by its path."
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in leaves(part, (*path, key)).items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in leaves(part, (*path, i)).items()}
    return {path: value}


def test_a_dry_run_changes_the_sizes_in_its_list_and_nothing_else():
    changed = set()
    for e in queue(*campaign.DATASETS, "shapes", *OTHER_SIZES, TRIALS):
        small = shrink(e)
        before, after = (leaves({f.name: getattr(v, f.name) for f in dataclasses.fields(v)}) for v in (e, small))
        assert before.keys() == after.keys()
        different = {path for path in before if before[path] != after[path]
                     or type(before[path]) is not type(after[path])}
        assert {path[-1] for path in different} <= set(TINY), e.experiment
        for path in before:
            if path[-1] in TINY and before[path] is not None:
                assert after[path] == min(before[path], TINY[path[-1]])
        changed |= {path[-1] for path in different}
        assert (small.experiment, small.dataset, small.seed) == (e.experiment, e.dataset, e.seed)
    assert changed == set(TINY)  # the list names nothing in vain


def without_widths(value):
    if isinstance(value, dict):
        return {k: without_widths(v) for k, v in value.items() if k != "width"}
    return value


@pytest.mark.parametrize("data", [*campaign.DATASETS, "shapes", *OTHER_SIZES, TRIALS])
def test_what_differs_in_earnest_differs_in_the_dry_run_too(data):
    alike = {}
    for e in queue(data):
        if e.seed == 0:
            alike.setdefault(config_hash(shrink(e).config), []).append(e)
    for first, *others in alike.values():  # a dry run is as short and narrow for everybody: such a difference is lost
        for e in others:
            as_long = dataclasses.replace(e, train={**e.train, **{k: first.train[k] for k in ("kimg", "batch_size")}})
            assert without_widths(as_long.config) == without_widths(first.config), (first.experiment, e.experiment)


def test_stand_in_images_are_of_every_size_and_split_and_gone_afterwards(monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_DATA", "before")
    with pytest.raises(KeyboardInterrupt), stand_in_data() as folder:
        for name, size in (("cifar10", 32), ("celeba64", 64), ("celeba256", 256)):
            for split in ("train", "test"):
                data = load_data(name, split)
                assert data.images.shape[1:] == (size, size, 3) and len(data) >= 6 and data.images.std() > 50
        raise KeyboardInterrupt
    assert not folder.exists() and os.environ["HYBRIDVAE_DATA"] == "before"
    monkeypatch.delenv("HYBRIDVAE_DATA")
    with stand_in_data():
        pass
    assert "HYBRIDVAE_DATA" not in os.environ


SAME_WORK = ("joint-none", "joint-1", "joint-100", "diffusevae-form2-z")  # as joint-10 and form2, but for a number
ON_CIFAR10 = ("joint-b8-vae", "joint-b8-two-stage", "flow-form1", "adaptive-control", "diffusevae-form2-noconcat")


LATER_RUNGS = tuple(f"distill-form1-{steps}" for steps in (16, 8, 4, 2, 1))  # as the first, from one another


@pytest.mark.parametrize("data", [
    "cifar10", "celeba64-cpu",  # the same code at other sizes takes minutes
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("cifar10 whole", "celeba64", "celeba256", "cifar10-full", TRIALS))])
def test_every_experiment_comes_through_a_dry_run_that_is_stopped_once(data, tmp_path, monkeypatch, float32):
    "Of the other seeds, which do the same work, one pair; in float32, which is faster for numbers so small."
    entries = [e for e in queue(data.partition(" ")[0])
               if e.seed == 0 and e.experiment.removesuffix("-cpu") not in SAME_WORK
               or e.seed == 1 and e.experiment in ("vae", "diffusevae-form1")]
    if data == "cifar10":
        entries = [e for e in entries if e.experiment not in LATER_RUNGS]
    if data.endswith("-cpu"):  # of the later stages one that starts from another: the rest is as without the suffix
        kept = ("features", "vae", "ddpm", "diffusevae", "joint-10-cpu")
        entries = [e for e in entries if e.experiment.startswith(kept)]
    if data == "celeba64":  # the same at another image size, at which each model is built, trained and sampled below
        entries = [e for e in entries if e.experiment not in ON_CIFAR10]
    before = dry_run(entries, tmp_path, minutes=0.03)
    assert len(before) < len(entries)  # it was stopped
    after = dry_run(entries, tmp_path)
    assert [(r["experiment"], r["seed"]) for r in before + after] == [(e.experiment, e.seed) for e in entries]
    for e in map(shrink, entries):
        record = recorded(e, tmp_path)
        assert e.missing(record) == [] and (e.folder(tmp_path) / "model.safetensors").exists()
        text = json.dumps(record)
        assert "NaN" not in text and "Infinity" not in text
        assert set(record["depends_on"]) == set(e.depends_on.values())
        hybrid = "DiffuseVAE" in e.model["model"]  # has pairs, and beside a path length the paths
        assert len(
            list(tmp_path.glob(f"{e.folder(tmp_path).parent.relative_to(tmp_path)}/seed{e.seed}*.[jp][pn]g"))
        ) == (0 if not e.evaluations else 1 + hybrid * (1 + ("path_length" in e.studies)))
    assert dry_run(entries, tmp_path) == []  # all is recorded


BARE = """
import importlib.metadata, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}: raise ModuleNotFoundError(name + " is blocked", name=name)

def unless_blocked(name, installed=importlib.metadata.distribution):  # others ask before they import
    if name.replace("-", "_") in {blocked!r}: raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

sys.meta_path.insert(0, Blocker())
importlib.metadata.distribution = unless_blocked
import hybridvae.campaign as campaign
import hybridvae
entries = campaign.queue()[:2]
records = campaign.dry_run(entries, "runs")
commits = [[r["commit"], r["dirty"]] for r in records]
print(json.dumps([hybridvae.__file__, [r["experiment"] for r in records], commits]))
"""
NOT_NEEDED = ["nbdev", "fastcore", "execnb", "nflows", "torch_fidelity", "diffusers", "IPython", "ipykernel", "jupyter",
              "jupyter_client", "jupyter_core", "nbformat", "nbconvert", "notebook", "pytest"]


def test_a_dry_run_needs_only_what_a_bare_machine_has(tmp_path):
    "A copy of the package without git, notebooks and development tools: what a borrowed machine with CUDA has."
    for name in ("hybridvae", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PATH": "", "HYBRIDVAE_COMMIT": "abc123", "PYTHONPATH": str(tmp_path)}
    environment.pop("HYBRIDVAE_RUNS", None)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BARE.format(blocked=NOT_NEEDED)], cwd=tmp_path,
                          env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, names, commits = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path)
    assert names == [e.experiment for e in ENTRIES[:2]] and commits == [["abc123", False]] * 2


# --- the real sizes -------------------------------------------------------------------------------------------------

FIRST = [e for e in ENTRIES if e.seed == 0]
# the network of another entry at the same size; at 256 pixels also what at 64 differs in the same way
TWICE = (*SAME_WORK[:3], *LATER_RUNGS, "adaptive-control", "distill-form1", "pca-k64", "pca-k32")
LARGE_TWICE = ("diffusevae-form1", "diffusevae-form2", "diffusevae-form2-z", "latent-mlp-long")


def at_real_size(e):
    "An entry as a test, a slow one where another is as it."
    slow = e.experiment in TWICE or e.dataset == "celeba256" and e.experiment in LARGE_TWICE
    return pytest.param(e, id=f"{e.dataset} {e.experiment}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("e", [*map(at_real_size, FIRST)])
def test_every_model_builds_learns_and_samples_at_its_real_size(e):
    torch.manual_seed(0)
    model = build_model(e.model).to(memory_format=torch.channels_last).train()
    assert e.parameters is None or count_parameters(model, trainable=True) == pytest.approx(e.parameters, rel=0.1)
    generates, size = hasattr(model, "image_shape"), load_size(e)
    n = 1 if size == 256 and generates else 2  # a feature network compares two
    x = torch.rand(n, 3, size, size, generator=generator()) * 2 - 1
    losses = model.training_loss(x, torch.zeros(len(x)), draws=Draws(0, 0))
    losses["loss"].backward()
    assert all(v.isfinite() for v in losses.values())
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)
    if generates:
        assert model.image_shape == (3, size, size)
        sample = model.eval().sample(1, sampler="dpmpp", steps=2, generator=generator())
        assert sample.shape == (1, 3, size, size) and sample.isfinite().all() and sample.abs().max() <= 1


def load_size(e):
    return {"cifar10": 32, "celeba64": 64, "celeba256": 256}[e.dataset]


@pytest.mark.parametrize("name, gflop", [("ddpm", 3.2), ("diffusevae-form1-z-full", 12.5)])
def test_a_forward_pass_at_32_pixels_costs_what_the_budgets_were_made_with(name, gflop):
    config = next(e for e in queue("cifar10", "cifar10-full") if e.experiment == name).model["unet"]
    with torch.device("meta"):  # operations are counted, not computed
        unet, x = UNet(**config), torch.zeros(1, 3, config["image_size"], config["image_size"])
        assert count_flops(unet, x, torch.zeros(1)) / 1e9 == pytest.approx(gflop, rel=0.1)


# --- compilation ----------------------------------------------------------------------------------------------------

HYBRID = entry("hybrid-full", model={"model": "DiffuseVAE", "vae": {k: v for k, v in VAE.items() if k != "model"},
                                     "unet": UNET})
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "cl"))), reason="needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_model_has_the_losses_of_the_eager_one_and_eager_context_does_without():
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    plain = build_model(HYBRID.model)
    for p in plain.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator()))  # also where layers start at zero
    compiled = build_model(HYBRID.model)
    compiled.load_state_dict(plain.state_dict())
    compile_networks(compiled)
    x = lambda step, n: torch.rand(n, 3, 32, 32, generator=generator(step))
    losses = lambda m, step, n=4: m.training_loss(x(step, n), draws=Draws(0, step))["loss"]
    counters.clear()
    for step in range(2):
        torch.testing.assert_close(losses(compiled, step), losses(plain, step), rtol=1e-4, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 3  # U-Net, encoder, decoder
    with eager():
        assert torch.equal(losses(compiled, 3, n=3), losses(plain, 3, n=3))  # another shape, not compiled
    assert counters["stats"]["unique_graphs"] == graphs
    assert compiled.state_dict().keys() == plain.state_dict().keys()  # weights keep their names


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="Linux with automatic groups")
def test_a_nice_campaign_is_nice_to_other_sessions():
    program = "from hybridvae.campaign import *; run_campaign([]); print(open('/proc/self/autogroup').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          preexec_fn=lambda: (os.setsid(), os.nice(7)))
    assert done.stdout.split()[-1] == "7", done.stderr
