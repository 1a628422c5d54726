"""What lesson 1 and the report say of the records: no more than the corrected comparisons, with both yardsticks."""
import json
import re
from pathlib import Path

import nbformat
import pytest

from hybridvae.report import page, read_bibliography, resolve_references

NBS = Path(__file__).parents[1] / "nbs"
LESSONS = pytest.mark.parametrize("lesson", ["01_diffusevae", "07_report"])
DISTANCE = re.compile(r"(FD|KID|texture distance|precision|recall|density|coverage|(refined )?x̂ )")


def cells(lesson):
    return json.loads((NBS / f"{lesson}.ipynb").read_text())["cells"]


def outputs(lesson, kind):
    return ["".join(o["data"][kind]) for c in cells(lesson) for o in c.get("outputs", []) if kind in o.get("data", {})]


def tables(lesson):
    "The tables of the stored outputs: rows by index, of cells by column."
    for html in outputs(lesson, "text/html"):
        rows = [[re.sub(r"<[^>]+>", "", cell).strip()
                 for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S)]
                for row in re.findall(r"<tr.*?</tr>", html, flags=re.S)]
        yield {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[1:]}


def families():
    "The tables of verdicts in lesson 1: of Scenes, and of Shapes."
    return [table for table in tables("01_diffusevae") if all("verdict" in row for row in table.values())]


def test_a_table_says_lower_or_higher_only_where_the_interval_is_on_that_side_of_zero():
    rows = [item for family in families() for item in family.items()]
    assert len(rows) >= 16
    for name, row in rows:
        low, high = map(float, row["95 % interval"].strip("[]").split(", "))
        if row["verdict"] == "not told apart":
            assert float(row["p (Holm)"]) >= 0.05 and float(row["within ±"]) >= abs(float(row["difference"])), name
        else:
            assert float(row["p (Holm)"]) < 0.05 and (high < 0 if row["verdict"] == "lower" else low > 0), name


GAP = re.compile(r"[+-]\d+ % \[([+-]\d+), ([+-]\d+)\] in (FD \(\w+\)|texture distance|high-frequency power)"
                 r"( \([^()]* against [^()]*\))?(?:, (lower|higher|not told apart)( \(within ±)?)?")
CELL = re.compile(r"^(?:(lower|higher|not told apart), p \d[\d.e-]*<br>)?([+-]\d+) %(?: \[([+-]\d+), ([+-]\d+)\])?<br>"
                  r"\S+ against \S+?(<br>within ± \S+)?$")


def test_every_sentence_of_the_report_on_a_difference_carries_its_interval_and_no_more():
    found = GAP.findall("\n".join(outputs("07_report", "text/markdown")))
    assert len(found) >= 8 and len({metric for _, _, metric, *_ in found}) >= 3
    for low, high, _, values, said, bound in found:
        assert int(low) <= int(high)
        assert not bound or values and said == "not told apart" and int(low) <= 0 <= int(high)
        assert bound or not values or said != "not told apart" or int(low) >= 0 or int(high) <= 0
        assert said not in ("lower", "higher") or (int(high) <= 0 if said == "lower" else int(low) >= 0)


def compared_cells():
    "The cells of the report's tables of comparisons: verdict, change, ends of the interval, bound; and trainings."
    for html in outputs("07_report", "text/html"):
        html = html.replace("\xa0", " ")
        if "<th>question</th><th>data set</th>" in html and " against " in html:
            for row in re.findall(r"<tr.*?</tr>", html, flags=re.S):
                cells = re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S)
                yield from ((CELL.match(cell), int(cells[3])) for cell in cells[:3] if cell and "times" not in cell)


def test_every_cell_of_a_comparison_carries_its_interval_and_a_verdict_where_three_trainings_decide():
    found = list(compared_cells())
    assert len(found) >= 60 and all(match for match, _ in found)
    for match, trainings in found:
        said, change, low, high, bound = match.groups()
        assert bool(said) == (trainings > 2)
        assert not bound or said == "not told apart" and int(low) <= 0 <= int(high)
        assert bound or said != "not told apart" or int(low) >= 0 or int(high) <= 0
        assert low is None or int(low) <= int(change) <= int(high)
        assert said not in ("lower", "higher") or (int(high) <= 0 if said == "lower" else int(low) >= 0)


def test_abstract_and_conclusion_say_what_the_results_say():
    "Every change in the abstract, and in the answers of the conclusion, stands in the results."
    found = outputs("07_report", "text/markdown")
    changes = lambda text: set(re.findall(r"[+-]\d+ % \[[^]]*\]", text))
    summaries = [text for text in found if text.startswith(("- *Refiner", "1. **Refiner"))]
    results = "\n".join([text for text in found if text not in summaries] + outputs("07_report", "text/html"))
    assert len(summaries) == 2 and len(changes("\n".join(summaries))) > 10
    missing = {change for text in summaries for change in changes(text)} - changes(results.replace("\xa0", " "))
    assert not missing, missing


def test_every_figure_of_the_report_has_alternative_text_and_its_page_shows_it():
    figures = ["".join(c["source"]) for c in cells("07_report") if "#| label: fig-" in "".join(c["source"])]
    assert len(figures) > 12 and not [text[:40] for text in figures if not re.search(r'^#\| fig-alt: "\w.{30,}"$',
                                                                                   text, flags=re.M)]
    nb = nbformat.read(NBS / "07_report.ipynb", as_version=4)
    html = page(resolve_references(nb, read_bibliography((NBS / "refs.bib").read_text())))
    pictures = re.findall(r"<img[^>]*>", html)
    assert len(pictures) >= len(figures)
    assert not [tag[-80:] for tag in pictures if not re.search(r'alt="(?!No description)[^"]{20,}"', tag)]


def test_labels_in_the_charts_of_the_report_are_of_nine_points_and_more():
    charts = outputs("07_report", "image/svg+xml")
    sizes = [float(size) for svg in charts for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    widths = [float(width) for svg in charts for width in re.findall(r'<svg [^>]*width="([\d.]+)pt"', svg)]
    assert len(charts) > 6 and len(sizes) > 100 and min(sizes) >= 9
    assert max(widths) <= 720  # of a page, in points: a wider chart would be shrunk, and its letters with it


def test_no_table_of_the_report_has_a_column_that_only_real_images_fill():
    seen = 0
    for table in tables("07_report"):
        models = [row for name, row in table.items() if not name.startswith("floor")]
        if len(models) < len(table):
            seen += 1
            empty = [column for column in models[0] if not any(row.get(column) for row in models)]
            assert not empty, empty
            assert {row["n"] for row in table.values()} == {row["n"] for row in models}  # no floor of another n
    assert seen >= 5


def test_no_number_of_a_result_is_typed_into_the_report():
    prose = "\n".join("".join(c["source"]) for c in cells("07_report") if c["cell_type"] == "markdown")
    typed = set(re.findall(r"\d+\.\d+|\d+ ?%|\d+ times", re.sub(r"\$[^$]*\$", "", prose)))
    assert typed <= {"95 %"}, typed


def test_every_figure_and_table_of_the_report_is_used_by_a_sentence():
    found = ["".join(c["source"]) for c in cells("07_report")]
    labels = {label for text in found for label in re.findall(r"^#\| label: (\S+)", text, flags=re.M)}
    used = {name for text in found for name in re.findall(r"@((?:fig|tbl)-[\w-]+)", text)}
    assert labels - used <= {"tbl-run"} and used <= labels  # the section of your own run is that table


@LESSONS
def test_no_distance_of_fewer_than_a_thousand_images_is_shown(lesson):
    seen = 0
    for table in tables(lesson):
        for name, row in table.items():
            if "n" in row and any(value and DISTANCE.match(column) for column, value in row.items()):
                assert int(row["n"].replace(",", "")) >= 1_000, (name, row)
                seen += 1
    assert seen > 5


@LESSONS
def test_every_table_of_models_has_both_yardsticks_and_the_floor(lesson):
    found = [table for table in tables(lesson) if all({"seeds", "FD (shapes)"} <= row.keys() for row in table.values())]
    assert found
    for table in found:
        assert "floor: real images" in table and all("sharpness: high-frequency power" in row for row in table.values())


@LESSONS
def test_words_that_the_numbers_do_not_carry_are_gone(lesson):
    text = "\n".join(["".join(c["source"]) for c in cells(lesson)] + outputs(lesson, "text/markdown"))
    for words in ("the spread", "goal reached", "sharp images", "adds what the VAE leaves out", "no record yet:"):
        assert words not in text, words


def test_what_lesson_1_reads_off_its_tables_stands_in_them():
    scenes, verdict = ({name: row["verdict"] for name, row in family.items()} for family in families())
    assert scenes == {
        "form1 - vae, FD": "lower", "form1 - vae, texture distance": "lower", "form1 - ddpm, FD": "lower",
        "form1 - ddpm, texture distance": "not told apart", "form1-z - form1, FD": "not told apart",
        "form1-z - form1, texture distance": "lower", "form1-z - form1, coherence": "not told apart"}
    assert verdict.pop("form2-noconcat - form2, FD") == "lower"
    assert len(verdict) == 11 and set(verdict.values()) == {"not told apart"}
