"""What lesson 1 and the report say of the records: no more than the corrected comparisons, with both yardsticks."""
import json
import re
from pathlib import Path

import pytest

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


GAP = re.compile(r"[+-]\d+ % \[([+-]\d+), ([+-]\d+)\] in ([^;]*?\))(?:, (lower|higher|not told apart)( \(within ±)?)?")


def test_every_sentence_of_the_report_on_a_difference_carries_its_interval_and_no_more():
    found = GAP.findall("\n".join(outputs("07_report", "text/markdown")))
    assert len(found) >= 20
    for low, high, metric, said, bound in found:
        assert int(low) <= int(high) and metric
        assert bool(bound) == (said == "not told apart")
        assert said not in ("lower", "higher") or (int(high) <= 0 if said == "lower" else int(low) >= 0)


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
