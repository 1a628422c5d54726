"""How code and prose are written: linters, lengths of cells and lines, the course's words.

Each check of a notebook returns what is wrong, and is itself tried on a planted fault.
"""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_site import NOTEBOOKS, cells, code, directives, exported, md, only_imports, parsed, source

ROOT = Path(__file__).parents[1]
LINE, CELL, LESSON_CELL = 120, 40, 25  # characters of a line; lines of a cell, and of one in the lessons 01 to 07
LIVE = 80  # characters of a line of code that a reader runs: a page shows so many beside its margins

# pattern -> what is written instead
WORDS = {
    r"\bplans?\b": "coarse image (or reconstruction) x̂",
    r"\b(?:mis|dis)?trust(?:s|ed|ing)?\b": "conditioning strength",
    r"\bdoubt(?:s|ed|ing|ful)?\b": "conditioning strength, or uncertainty",
}
RECORD_KEYS = r"""(["'])(?:trusted|doubted)\1"""  # in committed records, which stay as they are


def run(*words):
    "A module of Python as a program: what it prints where it fails."
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_is_clean():
    report = run("ruff", "check", "--no-cache", "--output-format", "concise", "hybridvae", "tests", "nbs")
    assert not report, report


def test_mypy_is_clean():
    report = run("mypy", "--cache-dir", "/dev/null")
    assert not report, report


# --- checks of one notebook: (path, nb) -> list of faults -----------------------------------------------------------

def bounded_cells(path, nb):
    limit = LESSON_CELL if re.match(r"0[1-7][a-z]?_", path.name) else CELL
    lengths = [(len(source(cell).splitlines()), source(cell)) for cell in cells(nb, "code")]
    return [f"a cell of {n} lines, more than {limit}, that opens with {text[:60]!r}"
            for n, text in lengths if n > limit]


def short_lines(path, nb):
    lines = [line for cell in nb["cells"] for line in source(cell).splitlines()]
    return [f"a line of {len(line)} characters: {line[:60]!r}" for line in lines if len(line) > LINE and breaks(line)]


def narrow_code(path, nb):
    lines = [line for cell in cells(nb, "code") if not exported(cell) for line in source(cell).splitlines()]
    return [f"a line of code of {len(line)} characters, more than {LIVE}: {line[:60]!r}" for line in lines
            if len(line) > LIVE and not line.startswith("#|") and breaks(line)]


def breaks(line):
    "Whether a line can be shorter: one that holds the address of a page cannot."
    return not re.search(r"https?://", line)


def folded_imports(path, nb):
    imports = [cell for cell in cells(nb, "code") if only_imports(cell)]
    return [f"'#| code-fold: true' is missing above {source(cell)[:60]!r}"
            for cell in imports if directives(cell).get("code-fold") != "true"]


def words(path, nb):
    faults = []
    for cell in nb["cells"]:
        text = re.sub(RECORD_KEYS, "", source(cell))
        for pattern, instead in WORDS.items():
            for match in re.finditer(pattern, text, flags=re.I):
                around = text[max(0, match.start() - 30):match.end() + 20].replace("\n", " ")
                faults.append(f"{match[0]!r} in {around!r}: write {instead}")
    return faults


def rows_with_names(path, nb):
    "A reader who has to count rows or columns to know what they are: their names belong beside them."
    calls = [node for cell in cells(nb, "code") for node in ast.walk(parsed(cell))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show_images"]
    titles = [ast.unparse(title) for call in calls
              for title in [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "title")]]
    return [f"the title {title} names rows or columns: give rows=[...], columns=[...]" for title in titles
            if re.search(r";| \| |\brows:|\bcolumns:", title)]


def stray_lists(path, nb):
    "A line of a paragraph that begins like a list is shown as one: `variance` and, on the next line, `1. The model`."
    faults = []
    for cell in cells(nb, "markdown"):
        text = re.sub(r"^(```|\$\$).*?\1", "", source(cell), flags=re.M | re.S)
        lines = text.splitlines()
        faults += [f"a line that begins like a list: {line[:60]!r}" for before, line in zip(lines, lines[1:])
                   if re.match(r"(1[.)]|[-+*]) ", line) and not re.match(r"$|\s*(\d+[.)]|[-+*]) |\||#|  ", before)]
    return faults


CHECKS = [bounded_cells, short_lines, narrow_code, folded_imports, words, rows_with_names, stray_lists]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_notebook(check, path):
    faults = check(path, json.loads(path.read_text()))
    assert not faults, f"{path.name}: " + "; ".join(faults)


# --- modules and tests ----------------------------------------------------------------------------------------------

def without_exports(text):
    "A module without its `__all__`, whose lines nbdev makes a little longer."
    return re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("path", sorted([*ROOT.glob("hybridvae/*.py"), *ROOT.glob("tests/*.py")]),
                         ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_lines_of_code_are_short(path):
    if path.name != "_modidx.py":
        long = [line for line in without_exports(path.read_text()).splitlines() if len(line) > LINE]
        assert not long, long


# --- each check on a planted fault ----------------------------------------------------------------------------------

LESSON, REFERENCE = Path("01_lesson.ipynb"), Path("90_reference.ipynb")
GOOD = [
    md("Two things:\n\n- one\n- two\n  lines\n- three\n\n1. a\n2. b\n\n$$x\n- y$$ {#eq-a}\n\n```\n# c\n- d\n```"),
    md("The coarse image x̂ and its uncertainty; a planet, `torch.eye`.\n[a](https://" + "x" * LINE + ")"),
    code("#| export\n#| code-fold: true\nimport math\n# the package\nfrom pathlib import Path"),
    code('answers["trusted"], answers[\'doubted\'], torch.eye(3)'),
    code("x = 1\n" * LESSON_CELL),
    code("show_images(x, 'samples', rows=['x̂', 'refined'])\nplt.title('real; made')"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_a_good_notebook(check):
    assert check(LESSON, {"cells": GOOD}) == []


FAULTS = [
    (bounded_cells, LESSON, code("x = 1\n" * (LESSON_CELL + 1)), "26 lines, more than 25"),
    (bounded_cells, LESSON, code("#| export\n" + "x = 1\n" * LESSON_CELL), "26 lines, more than 25"),
    (bounded_cells, REFERENCE, code("x = 1\n" * (CELL + 1)), "41 lines, more than 40"),
    (short_lines, LESSON, md("x" * (LINE + 1)), "121 characters"),
    (short_lines, LESSON, md("| a | " + "x " * LINE + " |"), "248 characters"),
    (short_lines, LESSON, code("#| fig-cap: " + "x" * LINE), "132 characters"),
    (narrow_code, REFERENCE, code("x = " + "1" * LIVE), "84 characters, more than 80"),
    (folded_imports, LESSON, code("import math"), "import math"),
    (folded_imports, LESSON, code("#| export\nfrom math import pi"), "from math import pi"),
    (stray_lists, LESSON, md("with variance\n1. The same"), "1. The same"),
    (stray_lists, LESSON, md("the bound\n- log p"), "- log p"),
    (words, LESSON, md("The VAE's Plan"), "'Plan'"),
    (words, LESSON, md("two plans"), "coarse image"),
    (words, LESSON, md("x̂ is trusted"), "conditioning strength"),
    (words, LESSON, code("distrust = 1"), "conditioning strength"),
    (words, LESSON, code("# in doubt"), "uncertainty"),
    (rows_with_names, LESSON, code("show_images(x, 'real; refined', zoom=2)"), "'real; refined'"),
    (rows_with_names, LESSON, code("show_images(x, title='rows: ' + names)"), "names rows"),
    (rows_with_names, LESSON, code("show_images(x, f'float | int{bits}')"), "names rows"),
]


@pytest.mark.parametrize("check, path, planted, says", FAULTS, ids=[f"{c.__name__}-{s}" for c, _, _, s in FAULTS])
def test_checks_find_a_planted_fault(check, path, planted, says):
    faults = check(path, {"cells": [planted]})
    assert len(faults) == 1 and says in faults[0]


def test_an_unclean_file_is_found(tmp_path):
    (tmp_path / "bad.py").write_text("import os\n\n\ndef f() -> int:\n    return 'x'\n")
    assert "F401" in run("ruff", "check", "--no-cache", "--select", "F", str(tmp_path))
    assert "return-value" in run("mypy", "--cache-dir", "/dev/null", "--config-file", "", str(tmp_path / "bad.py"))
    assert without_exports("__all__ = ['a',\n           'b']\nx = 1") == "\nx = 1"
