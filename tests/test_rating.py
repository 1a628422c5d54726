"""A rating is blind, the same for one seed, and its table counts what was chosen and names who chose."""
import csv
import json
import re
import sys

import pytest
import torch
from conftest import complains
from hybridvae import findings, rating
from hybridvae.core import save_grid
from hybridvae.rating import (QUALITIES, REAL, cut_grid, draw_pairs, rating_sets, rating_table, read_choices,
                              write_rating)
from statsmodels.stats.proportion import proportion_confint


def a_set(value, n=12):
    return torch.full((n, 3, 8, 8), value, dtype=torch.uint8)


SETS = {"VAE": a_set(10), "DDPM": a_set(120), REAL: a_set(250)}


def test_a_grid_is_cut_into_the_images_that_made_it(tmp_path):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(cut_grid(save_grid(images, tmp_path / "grid.png", columns=5), 8), images)


def test_pairs_are_the_same_for_a_seed_of_two_models_and_without_a_favourite_side():
    pairs = draw_pairs(SETS, 60)
    assert pairs == draw_pairs(SETS, 60) != draw_pairs(SETS, 60, seed=1)
    assert all(p["a"][0] != p["b"][0] for p in pairs)
    met = [tuple(sorted((p["a"][0], p["b"][0]))) for p in pairs]
    assert {met.count(pair) for pair in met} == {20}
    assert 10 < sum(p["a"][0] < p["b"][0] for p in pairs) < 50
    with complains("two models"):
        draw_pairs({"VAE": SETS["VAE"]})


def test_the_page_names_nobody_and_loads_nothing(tmp_path):
    page = write_rating(SETS, tmp_path / "rating", n=9).read_text()
    assert page.count("<fieldset>") == 9 and page.count("data:image/png") == 18
    assert not any(name in page for name in SETS) and not re.search(r"https?:", page)
    assert json.loads((tmp_path / "rating" / "key.json").read_text())["pairs"] == draw_pairs(SETS, 9)
    with open(tmp_path / "rating" / "choices.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0].keys() == {"pair", *QUALITIES, "rater"}
    with complains("nobody has chosen yet"):
        rating_table(tmp_path / "rating")


def fill(folder, rater, choose):
    "A filled table: choose(name of a, name of b) -> choice, for sharpness; coherence equal, the rest empty."
    pairs = json.loads((folder / "key.json").read_text())["pairs"]
    lines = [f"{k},equal,{choose(p['a'][0], p['b'][0])},,{rater}" for k, p in enumerate(pairs, 1)]
    (folder / f"choices-{rater}.csv").write_text("\n".join([f"pair,{','.join(QUALITIES)},rater", *lines]))


def test_the_table_counts_choices_with_wilsons_interval_and_names_the_raters(tmp_path):
    write_rating(SETS, tmp_path, n=30)
    order = list(SETS)
    fill(tmp_path, "anna", lambda a, b: "a" if order.index(a) > order.index(b) else "b")
    table, raters = rating_table(tmp_path)
    assert raters == {"anna": 30}
    low, high = proportion_confint(20, 20, method="wilson")
    assert table.loc[REAL, "sharpness"] == f"100 % [{100 * low:.0f}, {100 * high:.0f}], 20 decided"
    assert table.loc["VAE", "sharpness"].startswith("0 % [0, ") and table.loc["DDPM", "sharpness"].startswith("50 % ")
    assert table.loc["VAE", "coherence"] == "none decided" and table.loc["VAE", "structural integrity"] == ""
    fill(tmp_path, "ben", lambda a, b: "b" if order.index(a) > order.index(b) else "a")
    table, raters = rating_table(tmp_path)
    assert raters == {"anna": 30, "ben": 30} and table.loc[REAL, "sharpness"].startswith("50 % ")


@pytest.mark.parametrize("line, says", [("99,a,a,a,x", "'99'"), ("1,c,a,a,x", "'c'"), ("1,a,a,a,x\n2,a,a,a,y", "x, y")])
def test_a_table_that_cannot_be_is_one_sentence(tmp_path, line, says):
    path = tmp_path / "choices-x.csv"
    path.write_text(f"pair,{','.join(QUALITIES)},rater\n{line}")
    with complains(path, says):
        read_choices(path, 30)
    path.write_text("a,b\n1,2")
    with complains(path, "columns"):
        read_choices(path, 30)


def test_without_a_key_or_grids_the_remedy_is_named(tmp_path):
    with complains(tmp_path, "hybridvae rate"):
        rating_table(tmp_path)
    with complains("'gan'", "choose from", "vae"):
        rating_sets("shapes", ["gan"])
    with complains("nowhere", "hybridvae campaign"):
        rating_sets("nowhere")


def test_sets_are_the_committed_samples_and_real_images():
    sets = rating_sets("shapes", ["vae"])
    assert list(sets) == ["VAE", REAL] and all(images.shape == (100, 3, 32, 32) for images in sets.values())


def test_a_detector_finds_no_face_in_grey(monkeypatch):
    pytest.importorskip("cv2")
    assert rating.faces_found(SETS["VAE"][:2]) == [False, False]


def test_without_opencv_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with complains("pip install"):
        rating.faces_found(SETS["VAE"])


def test_shares_of_faces_have_intervals(monkeypatch):
    monkeypatch.setattr(rating, "faces_found", lambda images: [True, False, True, True])
    row = rating.face_table({"VAE": a_set(1, 4)})["VAE"]
    assert row["share"] == 0.75 and row["low"] < 0.75 < row["high"] and row["n"] == 4


def test_the_count_of_faces_is_a_record_that_findings_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rating, "faces_found", lambda images: [True] * len(images))
    rows = rating.write_faces("shapes", tmp_path / "shapes", ["vae"])
    monkeypatch.setattr(findings, "results_folder", lambda: tmp_path)
    said = findings.CLAIMS["faces"]([], "shapes").sentence
    assert rows.keys() == {"VAE", REAL} and said.startswith("100 % [96, 100] of VAE; 100 % [96, 100] of real images")
    assert not findings.CLAIMS["faces"]([], "celeba64").found
