"""The tables of experiments: what a row means, that its name is found, the order, and that records belong to it."""
import collections
import copy
from pathlib import Path

import pytest
from conftest import complains
from hybridvae import adaptive, experiments
from hybridvae.campaign import queue
from hybridvae.core import build_model, config_hash, load_records
from hybridvae.experiments import ONCE, PRESETS, SHIPPED, TABLES, Row, entries_of, entry_of, filled, inherited
from hybridvae.records import results_folder
from hybridvae.runs import _shipped_run

ENTRIES = entries_of()
ROWS = [row for table in TABLES.values() for row in table]


# --- rows -----------------------------------------------------------------------------------------------------------

def test_every_experiment_has_one_row_that_is_found_by_its_name():
    text = Path(experiments.__file__).read_text()
    names = {e.experiment for e in ENTRIES}
    assert names == {row.name for row in ROWS if inherited(row).on} and len(ROWS) == len({row.name for row in ROWS})
    assert all(text.count(f'Row("{name}"') == 1 for name in names)


def test_a_row_takes_from_its_parent_what_it_leaves_open():
    parent = filled("joint-b16-10")
    child = inherited(Row("new", "joint-b16-10", on=ONCE,
                          model={"vae": {"width": 8}, "balance": {"name": "uncertainty"}}))
    assert (
        child.model["vae"] == parent.model["vae"] | {"width": 8} and "beta" in child.model["vae"]
    )  # a part is changed
    assert child.model["balance"] == {"name": "uncertainty"}  # all else is replaced
    for column in set(vars(parent)) - {"name", "on", "model"}:
        assert getattr(child, column) == getattr(parent, column), column
    with complains("no table has a row 'joint-b17'"):
        inherited(Row("new", "joint-b17"))


def test_parts_numbers_and_factors_come_from_the_preset():
    row = Row("new", on=ONCE, model={"model": "X", "vae": {"part": "vae", "beta": 2.0, "times_sigma": 3},
                                     "t_range": [0, 1]},
              train={"part": "train", "times_kimg": "mlp_longer", "times_lr": 0.5}, batch="batch", n_study=7,
              evaluate=({"sampler": None, "steps": 1, "n": "n"}, {"sampler": None, "steps": 1, "n": "n_of_nothing"},
                        {"sampler": None, "steps": 1, "n": 5, "prior": "usual"}))
    for name in ("shapes", "cifar10"):
        preset, entry = PRESETS[name], entry_of(row, name)
        assert entry.model["vae"] == preset["vae"] | {"beta": 2.0, "sigma": 3 * preset["vae"]["sigma"]}
        assert entry.model["t_range"] == [0, 1] and "part" not in str(entry.model)
        assert entry.train == preset["train"] | {"kimg": preset["mlp_longer"] * preset["train"]["kimg"],
                                                 "lr": preset["train"]["lr"] / 2}
        assert (entry.batch, entry.n_study, entry.features) == (preset["batch"], 7, None)
        prior = {"prior": preset["prior"]} if "prior" in preset else {}
        assert entry.evaluations == ({"sampler": None, "steps": 1, "n": preset["n"]},
                                     {"sampler": None, "steps": 1, "n": 5} | prior)


def test_a_weight_pulls_as_hard_at_another_sigma():
    "λ times σ² is the same on every preset, and on Shapes, whose σ is 0.5, λ is what the row's name says."
    for name in ("joint-1", "joint-10", "joint-100"):
        entries = [next(e for e in entries_of(dataset) if e.experiment == name) for dataset in ("shapes", "cifar10")]
        pulls = [e.model["balance"]["value"] * e.model["vae"]["sigma"]**2 for e in entries]
        assert entries[0].model["balance"]["value"] == float(name.partition("-")[2])
        assert entries[1].model["vae"]["sigma"] != 0.5 and pulls[1] == pytest.approx(pulls[0])
    heavy = {d: next(e for e in entries_of(d) if e.experiment == "joint-b8-vae").model for d in ("shapes", "celeba64")}
    assert heavy["shapes"]["beta"] == 8 and heavy["celeba64"]["beta"] == pytest.approx(
        8 * (0.5 / heavy["celeba64"]["sigma"]) ** 2
    )


def test_scopes_say_on_which_presets_and_with_how_many_seeds():
    seen = collections.Counter((e.experiment, e.dataset) for e in ENTRIES)
    for row in map(inherited, ROWS):
        for name, seeds in row.on.items():
            assert seen[row.name, name.partition("-")[0]] == seeds
    row = Row("new", "diffusevae-form1",
              studies={"robustness": {"shapes": 1}, "path_length": {"shapes": 2, "cifar10": 1}})
    studies = lambda name, seed: entry_of(row, name, seed).studies
    assert studies("shapes", 0) == ("robustness", "path_length") and studies("shapes", 1) == ("path_length",)
    assert studies("shapes", 2) == studies("cifar10", 1) == () and studies("cifar10", 0) == ("path_length",)


def test_what_the_tables_make_is_theirs_alone():
    "Whoever changes an entry changes no preset and no other entry."
    before = copy.deepcopy(PRESETS)
    for entry in entries_of("shapes"):
        for part in (entry.model, entry.model.get("vae", {}), entry.train or {}, entry.depends_on, *entry.evaluations):
            part["new"] = 1
    assert PRESETS == before and "new" not in str(entries_of("shapes"))


def test_a_whole_number_of_thousand_images_may_be_written_as_a_float(monkeypatch):
    other = copy.deepcopy(PRESETS)
    for preset in other.values():
        for part in (part for part in preset.values() if isinstance(part, dict) and "kimg" in part):
            part["kimg"] = float(part["kimg"])
    monkeypatch.setattr(experiments, "PRESETS", other)
    assert [config_hash(e.config) for e in entries_of()] == [config_hash(e.config) for e in ENTRIES]


def test_the_strategies_that_are_evaluated_are_those_of_the_study():
    measured = [e for e in entry_of(filled("adaptive-normal"), "shapes").evaluations if e["steps"] == 10]
    for options in adaptive.STRATEGIES.values():
        assert any(options.items() <= e.items() for e in measured), options
    names = {e["uncertainty"] for e in entry_of(filled("adaptive-normal"), "shapes").evaluations if "uncertainty" in e}
    assert names == set(adaptive.UNCERTAINTIES)


@pytest.mark.parametrize("preset, name", SHIPPED)
def test_what_the_package_ships_of_a_run_is_of_its_config(preset, name, tmp_path):
    entry = entry_of(filled(name), preset)
    model = _shipped_run(entry, tmp_path)
    assert model.config == build_model(entry.model).config and SHIPPED[preset, name] == entry.shipped
    assert entry_of(filled(name), preset, 1).shipped is None


def test_unknown_data_sets_and_stages_are_refused():
    with complains("'imagenet'", "choose from shapes, scenes, cifar10"):
        entries_of("imagenet")
    with complains("'gan'", "diffusevae", "latent"):
        entries_of("shapes", "gan")
    assert [e.experiment for e in entries_of("shapes", "adaptive")][:2] == ["flow-vae", "flow-form1"]


# --- the order ------------------------------------------------------------------------------------------------------

def test_the_queue_is_in_the_order_of_the_rows():
    place = {row.name: i for i, row in enumerate(ROWS)}
    waves = lambda e: 3 if e.dataset == "celeba256" else 2 if filled(e.experiment).late else min(e.seed, 1)
    keys = [(waves(e), place[e.experiment]) for e in ENTRIES]
    assert keys == sorted(keys) and [wave for wave, _ in keys][-1] == 3


def test_what_an_entry_needs_comes_before_it():
    place = {(e.dataset, e.experiment, e.seed): i for i, e in enumerate(ENTRIES)}
    for e in ENTRIES:
        needed = [(e.dataset, name, e.seed) for name in e.depends_on.values()]
        needed += [(e.dataset, e.features, 0)] if e.features else []
        assert all(place[key] < place[e.dataset, e.experiment, e.seed] for key in needed), e.experiment


@pytest.mark.parametrize("data", ["celeba64", "cifar10"])
def test_at_cpu_size_the_main_entries_come_first_then_the_other_seeds_then_form_2(data):
    found = [(e.experiment.removesuffix("-cpu"), e.seed) for e in queue(f"{data}-cpu")]
    main = ["vae", "diffusevae-form1-z", "ddpm", "diffusevae-form1"]
    assert found[0] == ("features", 0) and found[1:5] == [(name, 0) for name in main]
    later = [found.index((name, seed)) for name in main for seed in (1, 2)]
    last = [i for i, (name, _) in enumerate(found) if name.startswith("diffusevae-form2")]
    assert later == sorted(later) and max(later) < min(last) and last == list(range(len(found) - 9, len(found)))


# --- the records ----------------------------------------------------------------------------------------------------

def test_no_committed_record_has_lost_its_experiment():
    "Its config is that of its row today: no training is missing that was done."
    entries = {(e.dataset, e.subset, e.experiment, e.seed): e for e in ENTRIES}
    records = load_records(results_folder())
    assert len(records) > 60
    for record in records:
        key = tuple(record[name] for name in ("dataset", "subset", "experiment", "seed"))
        assert record["config_hash"] == config_hash(record["config"]) == config_hash(entries[key].config), key
        assert "training" not in entries[key].missing(record)
        if record["dataset"] == "shapes":
            assert entries[key].missing(record) == [], key
