"""Findings follow the records: a record is changed, and the sentence changes; without one it says so."""
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hybridvae import findings as f
from hybridvae.findings import (CLAIMS, COMPARISONS, NO_RECORD, Gap, compared, evaluations_of, findings, gap_between,
                                number)
from hybridvae.metrics import paired_family
from hybridvae.records import all_records, load_records, results_folder

DATASETS = sorted({r["dataset"] for r in load_records(results_folder())})


def record(experiment, seed=0, fd=1.0, n=2_000, deviation=0.1, **keys):
    "A record as short as a finding can bear."
    metrics = {"FD (x)": {"value": fd, "deviation": deviation}, "FD (x) to training set": {"value": 9.0},
               "high-frequency power": {"value": 0.5}}
    main = {"sampler": "dpmpp", "steps": 20, "n": n, "nfe": 20, "metrics": metrics}
    return {"experiment": experiment, "dataset": "toy", "seed": seed, "evaluations": [main]} | keys


def pairs(a, b):
    "Refiner and VAE with these distances by seed."
    return ([record("diffusevae-form1-z", s, v) for s, v in enumerate(a)] +
            [record("vae", s, v) for s, v in enumerate(b)])


def test_a_changed_record_changes_the_sentence_and_its_verdict():
    said = {}
    for name, a in {"better": [1.0, 1.1, 1.2], "worse": [3.0, 3.1, 3.2], "same": [2.1, 1.9, 2.05]}.items():
        finding = findings("toy", pairs(a, [2.0, 2.02, 2.1]))["refiner"]
        said[name] = finding.verdict("FD"), finding.sentence
    assert [verdict for verdict, _ in said.values()] == ["lower", "higher", "not told apart"]
    assert said["better"][1].startswith("-46 % [") and said["worse"][1].startswith("+52 % [")
    assert "within ±" in said["same"][1] and "3 trainings each" in said["same"][1] and "n = 2,000" in said["same"][1]


def test_one_training_has_an_interval_over_images_and_is_no_claim():
    finding = findings("toy", pairs([1.0], [2.0]))["refiner"]
    width = 1.96 * np.hypot(0.1, 0.1)
    assert (finding.gaps["FD"].low, finding.gaps["FD"].high) == pytest.approx((-1 - width, -1 + width))
    assert "one training each, not a claim; intervals over images" in finding.sentence
    assert finding.verdict() == "too few trainings" and finding.trainings == 1
    without = pairs([1.0], [2.0])
    del without[0]["evaluations"][0]["metrics"]["FD (x)"]["deviation"]
    finding = findings("toy", without)["refiner"]
    assert "intervals" not in finding.sentence and "nan" not in finding.sentence and "[" not in finding.sentence


@pytest.mark.parametrize("key", [c.key for c in COMPARISONS if c.note == f.CHOSEN])
def test_what_was_chosen_on_a_seed_is_tested_without_it(key):
    "Three trainings, of which one was looked at: two are left, which is no claim."
    comparison = next(c for c in COMPARISONS if c.key == key)

    def evaluated(seed, shift):
        made = {}
        for (name, options), value in ((comparison.a, 1.0), (comparison.b, 2.0)):
            r = made.setdefault(name, record(name, seed) | {"evaluations": [record(name)["evaluations"][0]]})
            given = {k: v for k, v in options.items() if v is not None}
            metrics = {"FD (x)": {"value": value + shift, "deviation": 0.1}}
            r["evaluations"].append(r["evaluations"][0] | given | {"metrics": metrics})
        return made.values()
    records = [r for seed, shift in enumerate([9.0, 0.1, 0.2]) for r in evaluated(seed, shift)]
    finding = compared(records, "toy")[key]
    assert finding.trainings == 2 and finding.verdict() == "too few trainings" and "left out" in finding.sentence


def test_the_nearest_model_is_of_the_largest_n_and_no_trial():
    made = [record("ddpm", fd=3.0), record("vae", fd=2.5, n=1_000), record("trial-v", fd=1.0)]
    assert CLAIMS["nearest"](made, "toy").sentence.startswith("3.00 in FD (x): DDPM, the lowest mean FD")


def test_two_experiments_of_a_run_have_a_gap_over_images_and_none_where_n_differs():
    run = [record("ddpm-short", fd=20.0, deviation=0.3), record("diffusevae-form1-short", fd=10.0, deviation=0.4)]
    gap = gap_between(run, "diffusevae-form1-short", "ddpm-short")
    assert (gap.a, gap.b, gap.seeds) == (10, 20, 1) and gap.high - gap.low == pytest.approx(2 * 1.96 * 0.5)
    run[0] = record("ddpm-short", fd=20.0, n=1_000)
    assert gap_between(run, "diffusevae-form1-short", "ddpm-short") is None


def test_the_interval_is_that_of_the_paired_test_and_p_is_corrected_over_all_comparisons():
    records = pairs([1.0, 1.4, 1.2], [2.0, 2.6, 2.1]) + [record("ddpm", s, v) for s, v in enumerate([1.2, 1.3, 1.9])]
    found = compared(records, "toy")
    values = lambda name: {r["seed"]: r["evaluations"][0]["metrics"]["FD (x)"]["value"] for r in records
                           if r["experiment"] == name}
    power = {s: 0.5 for s in range(3)}
    a = values("diffusevae-form1-z")
    want = paired_family({"1": (a, values("vae")), "2": (a, values("ddpm")), "3": (power, power), "4": (power, power)})
    assert found["refiner"].gaps["FD"].p == pytest.approx(want["1"].p)
    assert found["ddpm"].gaps["FD"].low == pytest.approx(want["2"].low)


@pytest.mark.parametrize("change", [{"n": 500}, {"experiment": "vae-cpu"}])
def test_unequal_n_few_images_and_two_sizes_are_not_compared(change):
    records = [record("diffusevae-form1-z"), record(**{"experiment": "vae"} | change)]
    assert not findings("toy", records)["refiner"].found
    few = [record("diffusevae-form1-z", n=500), record("vae", n=500)]
    assert findings("toy", few)["refiner"].verdict() == NO_RECORD


def test_both_are_taken_at_the_largest_size_that_both_have():
    records = [record("vae-cpu", fd=4.0), record("vae", fd=9.0), record("diffusevae-form1-z-cpu", fd=1.0)]
    assert findings("toy", records)["refiner"].gaps["FD"].b == 4.0
    assert "CPU size" in findings("toy", records)["refiner"].sentence


@pytest.mark.parametrize("without, with_z, chosen", [
    (3, 1, "diffusevae-form1"), (3, 3, "diffusevae-form1-z"), (1, 0, "diffusevae-form1"), (0, 1, "diffusevae-form1-z"),
    (0, 0, None)])
def test_the_refiner_with_more_trainings_stands_for_both(without, with_z, chosen):
    made = [record("vae"), *(record("diffusevae-form1", s) for s in range(without)),
            *(record("diffusevae-form1-z", s) for s in range(with_z))]
    assert f.with_refiner(made, "vae") == (chosen and ["vae", chosen])


def test_an_option_is_added_to_those_of_the_main_evaluation_or_taken_away():
    r = record("ddpm")
    main = r["evaluations"][0] | {"prior": "ex-pde"}
    plain, ten = record("ddpm", fd=2.0)["evaluations"][0], main | {"steps": 10}
    r["evaluations"] = [main, plain, ten]
    assert evaluations_of([r], "ddpm", {}) == {0: main} == evaluations_of([r], "ddpm", {"prior": "ex-pde"})
    assert evaluations_of([r], "ddpm", {"prior": None}) == {0: plain}
    assert evaluations_of([r], "ddpm", {"steps": 10}) == {0: ten} and evaluations_of([r], "ddpm", {"steps": 5}) == {}


def test_without_records_every_claim_says_so_and_nothing_fails():
    found = findings("nowhere", [])
    assert found.keys() == {c.key for c in COMPARISONS} | CLAIMS.keys()
    # quantised weights and timings are read from files of their own
    assert all(x.sentence.startswith("No record yet on nowhere") and not x.found for x in found.values())


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_finding_of_the_committed_records_opens_with_its_number_and_says_what_stands_behind(dataset):
    for x in findings(dataset).values():
        if x.found:
            assert re.match(r"[-+]?\d", x.sentence), x
            assert x.sentence.endswith(".") and "nan" not in x.sentence and "None" not in x.sentence
        else:
            assert x.sentence.startswith("No record yet")
        for gap in x.gaps.values():
            told = "lower" if gap.high < 0 else "higher" if gap.low > 0 else "not told apart"
            assert gap.verdict in ("too few trainings", "not told apart", told)


@pytest.mark.parametrize("key", ["nearest", "ratio", "detail"])
def test_single_claims_follow_their_record_too(key):
    one, two = (findings("toy", pairs([a], [4.0]))[key].sentence for a in (1.0, 2.0))
    assert one != two or key == "detail"
    if key == "ratio":
        assert one.startswith("4.00 times") and two.startswith("2.00 times")


def test_agreement_and_noise_of_few_images():
    answer = {"n": 250, "both": 0.9, "shuffled": {"both": 0.1}}
    noisy = {"n": 2_000, "levels": [0.0, 0.2], "noise on x̂": [2.0, 5.0], "noise on z": [2.0, 2.0]}
    records = [record("diffusevae-form1-z", condition_agreement=answer, robustness=noisy)]
    assert findings("toy", records)["agreement"].sentence.startswith("90 % of the refinements keep shape and hue")
    assert findings("toy", records)["noise"].sentence.startswith("2.50 times the distance")
    records[0]["robustness"] = noisy | {"n": 250}
    assert not findings("toy", records)["noise"].found  # no distance of fewer than a thousand images


def test_the_order_counts_the_pairs_that_are_told_apart():
    names = ("diffusevae-form1", "diffusevae-form1-z", "diffusevae-form2")
    records = [record(name, s, k + s / 100) for k, name in enumerate(names, 1) for s in range(3)]
    records += [record("vae", s, 9.0) for s in range(3)]
    said = findings("toy", records)["order"].sentence
    assert said.startswith("3 of 3 pairs") and re.search(r"form 1 \(.*< form 1 \+ z \(.*< form 2 \(.*< VAE", said)


@pytest.mark.parametrize("prior", [{}, {"prior": "ex-pde"}])
def test_times_are_found_whether_or_not_they_name_the_prior_of_the_main_evaluation(monkeypatch, prior):
    records = [record(name) for name in ("vae", "ddpm", "diffusevae-form1-z")]
    for one in (records[0], records[2]):
        one["evaluations"][0]["prior"] = "ex-pde"
    options = {"sampler": "dpmpp", "steps": 20}
    rows = [{"experiment": r["experiment"], "evaluation": options | (prior if r["experiment"] != "ddpm" else {}),
             "seconds_per_image": seconds} for r, seconds in zip(records, (0.001, 0.02, 0.04))]
    rows.append({"experiment": "latent", "evaluation": options, "seconds_per_image": 0.005})
    monkeypatch.setattr("hybridvae.records.sampling_times", lambda dataset: rows)
    found = findings("toy", records)
    assert found["time"].sentence.startswith("40.0 times the VAE's time, and 2.00 times the DDPM's")
    assert found["latent time"].sentence.startswith("-75 % for latent")


def test_tables_name_the_command_that_measures_fid_and_what_is_not_recorded():
    table = f.replication_table()
    assert table.shape == (5, 9) and table["cifar10", "FID, report"]["VAE"] == "147.13"
    cells = set(table.xs("FID, here", axis=1, level=1).to_numpy().ravel())
    assert cells <= {f.STANDARD, NO_RECORD} | {c for c in cells if "n = " in c}
    assert list(f.replication_table(score=True).columns.get_level_values(0).unique()) == ["cifar10"]
    assert set(f.provenance_table("celeba64")["experiment"]) == {
        r["experiment"] for r in all_records("celeba64")}


def test_a_row_beside_the_replication_has_one_size(monkeypatch):
    made = [record("vae", fd=9.0), record("vae-cpu", fd=4.0), record("diffusevae-form1-z-cpu", fd=1.0)]
    monkeypatch.setattr(f, "all_records", lambda dataset: made)
    row = f.replication_table()["celeba64", "FD, here"]
    assert row["VAE"].startswith("4.00 (n = 2,000, CPU size") and row["form 1 + z"].startswith("1.00")
    assert f.common_size([record("vae"), record("vae-cpu")]) == ""  # of equals the larger


def test_no_two_comparisons_are_the_same_test():
    "On any data set: the same values twice would make the correction for all of them too strict."
    for dataset in DATASETS:
        seen, records = {}, all_records(dataset)
        for c in COMPARISONS:
            found = f._measured(records, c, "FD")
            if found:
                values = json.dumps([[m["value"] for m in entries.values()] for entries in found[1:3]])
                assert seen.setdefault(values, c.key) == c.key, (dataset, c.key, seen[values])


def test_a_small_ddpm_stands_beside_the_hybrid_with_its_u_net():
    records = [record("diffusevae-form1-z-small-cpu", fd=1.0), record("ddpm-small-cpu", fd=2.0)]
    said = findings("toy", records)["ddpm"].sentence
    assert said.startswith("-50 % [") and "“form 1 + z, small, CPU size” less “DDPM, small, CPU size”" in said


def test_a_change_of_many_times_is_told_as_a_ratio():
    said = str(Gap("high-frequency power", 0.9, 0.01, 0.79, 0.99, 3, p=0.01))
    assert said.startswith("90.0 times [80.0, 100] the high-frequency power (0.90 against 0.01; real images 1), higher")
    assert str(Gap("FD (x)", 5.0, 1.0, 3.0, 5.0, 3, p=0.01)).startswith("+400 % [+300, +500] in FD (x)")


def test_pictures_are_drawn_where_there_are_records():
    for dataset in DATASETS:
        figure = f.show_pairs(dataset)
        assert (figure is None) == (f.pairs_record(dataset) is None)
    assert f.show_pairs("nowhere") is None and f.show_gaps("nowhere") is None
    plt.close("all")


@pytest.mark.parametrize("value, want", [(0.627, "0.63"), (20.03, "20.0"), (1204.4, "1,204"), (-7.5, "-7.50")])
def test_numbers_have_about_three_figures(value, want):
    assert number(value) == want


def test_a_gap_of_a_negative_reference_keeps_its_sign():
    assert str(Gap("KID (x)", 0.5, -1.0, 1.0, 2.0, 1)).startswith("+150 % [+100, +200]")


def test_what_int8_costs_names_the_parts_that_stayed_in_float(monkeypatch):
    rows = lambda fd: [{"variant": name, "n": 1_000, "metrics": {"FD (x)": value, "texture distance": 1.0}}
                       for name, value in (("fp32", 2.0), ("int8", fd))]
    table = {"w, up.7 in float": {"dataset": "scenes", "rows": rows(2.02)},
             "w": {"dataset": "scenes", "rows": rows(2.2)}, "other": {"dataset": "shapes", "rows": rows(3.0)}}
    monkeypatch.setattr(f, "_json", lambda name: table)
    said = f.int8([], "scenes")[0]
    assert said.startswith("+10.0 % in FD (x)") and "with up.7 in float +1.0 % in FD (x)" in said and "50" not in said
    del table["w, up.7 in float"]
    assert "in float" not in f.int8([], "scenes")[0] and f.int8([], "cifar10") is None


def test_a_table_of_comparisons_says_of_each_data_set_what_its_records_hold():
    three, one = findings("toy", pairs([1.0, 1.1, 1.2], [2.0, 2.02, 2.1])), findings("toy", pairs([1.0], [2.0]))
    table = f.comparisons_table({"A": three, "B": one}, "refiner", "forms")
    asked = three["refiner"].question
    assert list(table.index) == [(asked, "A"), (asked, "B"), (three["forms"].question, NO_RECORD)]
    first, second = (table.loc[(asked, name), "FD"].replace("\xa0", " ").split("\n") for name in "AB")
    assert re.fullmatch(r"lower, p 0\.0\d+", first[0]) and first[1].startswith("-46 % [")
    assert first[2] == "1.10 against 2.04"
    assert len(second) == 2 and second[1] == "1.00 against 2.00"  # one training: no verdict
    assert list(table["trainings"]) == ["3", "1", ""] and "n = 2,000" in table.loc[(asked, "B"), "models"]
    assert list(table["texture distance"]) == ["", "", ""]  # not measured
