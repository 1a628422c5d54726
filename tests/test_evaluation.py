"""The final evaluation: tables, differences, fronts and answers follow the records, and say no more than they do."""
import json
import math
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import complains
from scipy.stats import ttest_rel

from hybridvae import evaluation, records
from hybridvae.core import load_records
from hybridvae.evaluation import (FAMILIES, LABELS, QUALITY, QUESTIONS, Difference, comparison, difference,
                                  export_table, family, growth_under_noise, in_digits, joint_answer, label,
                                  measurements, palette, pareto_front)
from hybridvae.records import results_folder


def metric(value, deviation=None):
    return {"value": value, "reference": "held-out", "feature_network": "faces", "hash": "a"} | (
        {} if deviation is None else {"deviation": deviation})


def record(experiment, seed=0, fd=1.0, deviation=0.1, **keys):
    "A record as short as the evaluation can bear; `other` is an evaluation with a fitted prior."
    measured = lambda value: {"sampler": "dpmpp", "steps": 20, "n": 2_000, "nfe": 20, "metrics": {
        "FD (faces)": metric(value, deviation), "FD (faces) to training set": metric(9.0),
        "texture distance": metric(2 * value), "high-frequency power": metric(0.5)}}
    return {"experiment": experiment, "dataset": "celeba64", "subset": None, "seed": seed, "kimg": 10,
            "parameters": 1_000_000, "evaluations": [measured(fd), measured(fd / 2) | {"prior": "ex-pde"}]} | keys


@pytest.fixture
def written(tmp_path, monkeypatch):
    "Writes records into a folder that takes the place of the committed ones."
    monkeypatch.setattr(records, "record_roots", lambda: [tmp_path])
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path)

    def write(*made):
        shutil.rmtree(tmp_path / "celeba64", ignore_errors=True)
        for r in made:
            folder = tmp_path / r["dataset"] / r["experiment"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"seed{r['seed']}.json").write_text(json.dumps(r))
        return load_records(tmp_path)
    return write


def test_every_experiment_of_the_tables_has_a_family_and_a_colour():
    names = {r["experiment"] for r in load_records(results_folder())}
    assert {family(name) for name in names if not name.startswith(("trial", "features"))} <= set(FAMILIES.values())
    assert len(set(palette().values())) == len(FAMILIES) + 1
    assert label("ddpm-cpu") == f"{LABELS['ddpm']}, CPU size" and label("no-such") == "no-such"


def test_measurements_have_a_row_for_each_evaluation_of_each_seed(written):
    written(record("ddpm", 0, 1.0), record("ddpm", 1, 3.0), record("trial-v"))
    frame = measurements("celeba64")
    assert len(frame) == 4 and frame["main"].sum() == 2 and set(frame["experiment"]) == {"ddpm"}
    assert frame[frame["main"]]["FD"].tolist() == [1.0, 3.0] and frame["± FD"].eq(0.1).all()
    assert frame[frame["prior"] == "ex-pde"]["FD"].tolist() == [0.5, 1.5]
    assert frame["recall"].isna().all() and frame["n"].eq(2_000).all()  # what was not measured is no number


def test_the_table_shows_spread_labels_costs_and_the_floor_of_its_n(written):
    floor = record("features", floors={"2000": {"train to held-out": {"FD (faces)": 0.3}}}, evaluations=[])
    written(record("ddpm", 0, 1.0), record("ddpm", 1, 3.0), record("vae", 0, 2.0, 0.25), floor)
    table = comparison("celeba64")
    assert table.loc["DDPM", "FD (faces)"] == f"2.00 ± {np.std([1, 3], ddof=1):.2f}" and table.loc["DDPM", "seeds"] == 2
    assert table.loc["VAE", "FD (faces)"] == "2.00 (± 0.25)" and table.loc["VAE", "parameters (M)"] == "1.00"
    assert table.loc["floor: real images", "FD (faces)"] == "0.30"
    assert not {"bits per dimension", "recall (faces)"} & set(table.columns)  # nobody measured them


def test_three_seeds_are_compared_in_pairs_and_one_over_its_images(written):
    a, b = [1.0, 2.0, 4.0], [2.0, 2.5, 5.5]
    made = written(*(record("ddpm", s, v) for s, v in enumerate(a)), *(record("vae", s, v) for s, v in enumerate(b)))
    gap = difference(made, ("ddpm", {}), ("vae", {}))
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    assert (gap.value, gap.low, gap.high, gap.seeds) == pytest.approx((-1.0, low, high, 3))
    assert gap.per_cent == pytest.approx(-100 / np.mean(b) * 1.0)
    other = difference(made, ("ddpm", {"prior": "ex-pde"}), ("vae", {}))
    assert other.value == pytest.approx(np.mean(a) / 2 - np.mean(b))
    made = written(record("ddpm", 0, 1.0, 0.3), record("vae", 0, 2.0, 0.4))
    gap = difference(made, ("ddpm", {}), ("vae", {}))
    assert (gap.low, gap.high, gap.seeds) == pytest.approx((-1 - 1.96 * 0.5, -1 + 1.96 * 0.5, 1))
    assert "one training each" in str(gap) and gap.apart


def test_without_an_interval_there_is_no_difference(written):
    made = written(record("ddpm", 0, 1.0, None), record("vae", 0, 2.0), record("vae", 1, 2.0))
    assert difference(made, ("ddpm", {}), ("vae", {})) is None  # one seed, no bootstrap
    assert difference(made, ("joint", {}), ("vae", {})) is None  # no record
    assert difference(made, ("vae", {"prior": "realnvp"}), ("vae", {})) is None  # not measured


def test_an_interval_that_holds_zero_is_not_apart():
    gap = Difference(-1.0, -2.0, 0.1, -50.0, 3)
    assert not gap.apart and Difference(-1.0, -2.0, -0.1, -50.0, 3).apart and "-50 %" in str(gap)


def test_the_front_is_what_nothing_beats_in_both():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"cost": rng.random(60), "quality": rng.random(60)})
    frame.loc[0, "quality"] = math.nan
    front = pareto_front(frame, "cost", "quality")
    whole = frame.dropna().to_numpy()
    beaten = [((whole <= row).all(axis=1) & (whole < row).any(axis=1)).any() for row in whole]
    assert sorted(front["cost"]) == sorted(whole[~np.array(beaten), 0]) and front["cost"].is_monotonic_increasing


def test_tables_are_written_as_csv_and_latex_and_nothing_else(tmp_path):
    table = pd.DataFrame({"FD": ["2.00 ± 0.25"]}, index=["DDPM"])
    assert pd.read_csv(export_table(table, tmp_path / "a.csv"), index_col=0).loc["DDPM", "FD"] == "2.00 ± 0.25"
    text = export_table(table, tmp_path / "a.tex").read_text()
    assert r"\toprule" in text and r"2.00 $\pm$ 0.25" in text
    with complains("a.docx", ".csv or .tex"):
        export_table(table, tmp_path / "a.docx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.tex"]


def test_an_answer_follows_its_records(written):
    "A record is changed, and the sentence changes with it."
    def sentence(joint):
        written(*(record("joint-10", s, v) for s, v in enumerate(joint)),
                *(record("joint-none", s, v) for s, v in enumerate([2.0, 2.5, 5.5])))
        return joint_answer("celeba64").sentence
    better, worse, same = sentence([1.0, 1.5, 4.4]), sentence([3.0, 3.5, 6.6]), sentence([2.1, 2.4, 5.4])
    assert better.startswith("-31 % in FD (") and better.count("lies below zero") == 4  # two distances, two priors
    assert worse.startswith("+31 % in FD (") and worse.count("lies above zero") == 4
    assert same.count("holds zero") == 4 and "told apart" not in better + worse + same  # a verdict needs a correction


def test_digits_follow_the_width_of_the_interval():
    assert in_digits(-0.612, -1.571, 0.348) == "-0.61 [-1.57, +0.35]"
    assert in_digits(-53.56, -72.27, -34.84) == "-53.6 [-72.3, -34.8]"
    assert in_digits(0.00179, -0.00108, 0.00466) == "+0.00179 [-0.00108, +0.00466]"


def test_every_model_that_was_measured_with_noise_is_named_from_the_least_hurt_on(written):
    robustness = {"n": 1_000, "levels": [0.0, 0.2], "noise on x̂": [1.0, 3.0], "noise on z": [1.0, 1.0]}
    names = {"diffusevae-form1": 3.0, "diffusevae-form1-z": 2.0, "diffusevae-form2": 4.0}
    written(*(record(name, robustness=robustness | {"noise on x̂": [1.0, end]}) for name, end in names.items()))
    said = evaluation.noise_answer("celeba64").sentence
    assert re.findall(r"(\d\.\d) times", said) == ["2.0", "3.0", "4.0"] and all(label(name) in said for name in names)


def test_the_time_of_a_flow_prior_has_its_quartiles_and_says_where_it_was_not_timed(monkeypatch):
    said = evaluation.flow_sentence("shapes")
    assert said.count("[") >= 4 and "3 trainings each" in said
    monkeypatch.setattr(evaluation, "sampling_times", lambda dataset: [])
    assert "not timed here" in evaluation.flow_sentence("shapes")


def test_quartiles_that_overlap_are_no_difference_in_time(monkeypatch):
    quartiles = {"full conditioning": [0.010, 0.012], "adaptive strength": [0.0115, 0.013]}
    assert evaluation.overlap(*({"quartiles": q} for q in quartiles.values()))
    assert not evaluation.overlap({"quartiles": [0.010, 0.011]}, {"quartiles": [0.012, 0.013]})
    assert not evaluation.overlap(None, {"quartiles": [0.010, 0.011]})
    assert "no measured difference in time for adaptive strength" in evaluation.adaptive_answer("shapes").sentence


@pytest.mark.parametrize("question", QUESTIONS)
def test_without_records_an_answer_says_what_is_missing(written, question):
    written(record("ddpm"))
    answer = question("celeba64")
    assert "Not answered on celeba64" in answer.sentence and "hybridvae campaign" in answer.limit
    assert answer.table is None and answer.question in str(answer)


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_of_the_committed_records_has_a_table_or_says_that_it_has_none(question):
    answer = question("shapes")
    assert answer.question.endswith("?") and answer.sentence.endswith(".")
    assert (answer.table is None) == ("Not answered" in answer.sentence)


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_an_answer_on_the_data_of_the_lessons(question):
    "That of adaptive conditioning once found no times there, since its evaluations name a prior."
    answer = question("scenes")
    assert answer.table is not None and "Not answered" not in answer.sentence


def test_growth_under_noise_is_relative_to_each_seeds_own_distance(written):
    robustness = {"n": 1_000, "levels": [0.0, 0.2], "noise on x̂": [2.0, 5.0], "noise on z": [2.0, 2.0]}
    made = written(record("ddpm", robustness=robustness), record("ddpm", 1, robustness=robustness | {
        "noise on x̂": [1.0, 4.0]}))
    assert growth_under_noise(made) == {"DDPM": {0.0: [1.0, 1.0], 0.2: [2.5, 4.0]}}
    assert not growth_under_noise([record("ddpm", robustness=robustness | {"n": 999})])  # too few for a distance
    alone = evaluation.noise_answer("celeba64").sentence
    assert alone.count("DDPM") == 1 and alone.startswith("3.2 times")


def test_a_bound_above_that_of_uniform_noise_is_not_shown(written):
    said = {"n": 9, "own": {"bits_per_dim": 6.5}}, {"n": 9, "own": {"bits_per_dim": 38.0}}
    written(record("vae", likelihood=said[0]), record("ddpm", likelihood=said[1]))
    bits = evaluation.measurements("celeba64").groupby("experiment")["bits per dimension"].max()
    assert bits["vae"] == 6.5 and math.isnan(bits["ddpm"])


def test_all_kinds_of_quality_are_columns_of_the_committed_records():
    frame = evaluation.measurements("cifar10")
    assert set(QUALITY) <= set(frame.columns) and frame["FD"].notna().all()


def test_models_of_about_equal_cost_share_a_mark_on_the_front():
    rows = [("a", 1.0, 9.0), ("b", 2.0, 8.0), ("c", 2.05, 7.0), ("d", 2.09, 6.0), ("e", 4.0, 5.0)]
    _, ax = plt.subplots()
    evaluation._name_front(pd.DataFrame(rows, columns=["model", "ms", "FD"]), "ms", "FD", ax)
    assert [text.get_text() for text in ax.texts] == ["1", "2 to 4", "5"]
    plt.close("all")


def test_a_path_length_of_one_training_is_told_without_an_interval(monkeypatch):
    made = [record(name, path_length={"n": 5_000, "x̂": length}) | {"studied": {}}
            for name, length in (("joint-10-cpu", 90.0), ("joint-none-cpu", 100.0))]
    monkeypatch.setattr(evaluation, "all_records", lambda dataset: made)
    said = evaluation.space_answer("toy")
    assert said.sentence.startswith("-10 % in path length (90.0 against 100.0)") and "no interval" in said.sentence
    monkeypatch.setattr(evaluation, "all_records", lambda dataset: made[:1])
    assert evaluation.space_answer("toy").table is None
