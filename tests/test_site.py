"""What Quarto would check, and the habits of the notebooks: every check takes a notebook and returns what is wrong.

Each check is itself tried on a notebook with that one fault planted (`FAULTS`), so that none can pass by accident.
"""
import ast
import base64
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from layers import PICTURE, direct, floors, import_graph, svg
from readme import FOUND, PAIRS, readme, tour_pictures

from hybridvae.findings import first_page

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("[!_]*.ipynb"))
CROSSREF = re.compile(r"(?:fig|tbl|sec|eq|lst|thm|def)-[\w-]+")
MAX_BYTES, MAX_LINES = 1_000_000, 15


# --- reading a notebook ---------------------------------------------------------------------------------------------

def source(cell):
    return "".join(cell["source"])


def cells(nb, kind):
    return [c for c in nb["cells"] if c["cell_type"] == kind]


def directives(cell):
    "The `#| key: value` lines of a cell; a flag such as `#| export` has the value ''."
    found = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source(cell), flags=re.M)
    return {key: value.strip() for key, value in found}


def exported(cell):
    return bool(directives(cell).keys() & {"export", "exporti", "exports"})


def parsed(cell):
    "The syntax tree of a cell, IPython's magics left out."
    return ast.parse(re.sub(r"^[ \t]*[%!].*$", "", source(cell), flags=re.M))


def only_imports(cell):
    "Whether a cell holds imports and nothing else."
    body = parsed(cell).body
    return bool(body) and all(isinstance(stmt, (ast.Import, ast.ImportFrom)) for stmt in body)


def prose(nb):
    "The markdown of a notebook with its code blocks and inline code taken out, one string per cell."
    texts = [re.sub(r"^(```|~~~).*?^\1", "", source(c), flags=re.M | re.S) for c in cells(nb, "markdown")]
    captions = [directives(c).get(f"{kind}-cap", "") for c in cells(nb, "code") for kind in ("fig", "tbl")]
    return [re.sub(r"(`+).+?\1", "", text) for text in texts + captions]


def output_text(nb):
    "What the stored outputs say, pictures left out."
    for out in (out for c in cells(nb, "code") for out in c["outputs"]):
        data = {k: v for k, v in out.get("data", {}).items() if not k.startswith("image/") or "svg" in k}
        yield from ("".join(t) for t in [out.get("text", ""), *data.values()] if isinstance(t, (str, list)))


def labels(nb):
    "Every label that `@fig-x` and the like may refer to."
    found = [directives(c).get("label", "") for c in cells(nb, "code")]
    return found + [x for text in prose(nb) for x in re.findall(r"\{#([\w-]+)[^}]*\}", text)]


def anchors(nb):
    "Labels, and the identifiers that pandoc gives to headings."
    headings = [h for text in prose(nb) for h in re.findall(r"^#+\s+(.*?)\s*(?:\{.*\})?$", text, flags=re.M)]
    slugs = [re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", h.lower())).lstrip("-0123456789.") for h in headings]
    return {*labels(nb), *slugs}


def bib_keys(bib):
    return re.findall(r"^@\w+\{([^,\s]+),", bib, flags=re.M)


# --- checks of one notebook: (path, nb) -> list of faults -----------------------------------------------------------

def title_cell(path, nb):
    if not nb["cells"] or nb["cells"][0]["cell_type"] != "markdown":
        return ["the first cell is not the title"]
    title, *rest = source(nb["cells"][0]).splitlines()
    faults = [] if re.match(r"# \S", title) else [f"the title cell opens with {title!r}, not with '# title'"]
    return faults + [f"the title cell holds {line!r}" for line in rest if not re.match(r"$|> \S|- [\w-]+: \S", line)]


def links(path, nb):
    faults = []
    for target in (t for text in prose(nb) for t in re.findall(r"\]\(<?([^)>\s]+)|(?:src|href)=[\"']([^\"']+)", text)):
        target = target[0] or target[1]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if name and not file.exists():
            faults.append(f"the link {target} leads nowhere")
        elif anchor and file.suffix == ".ipynb":
            there = json.loads(file.read_text()) if name else nb
            faults += [] if anchor in anchors(there) else [f"the link {target} names no heading or label"]
    return faults


def citations(path, nb):
    known = bib_keys((path.parent / "refs.bib").read_text())
    used = [k for text in prose(nb) for k in re.findall(r"(?<![\w.@/])@\{?([A-Za-z][\w:-]*\w)", text)]
    return [f"@{key} is not in refs.bib" for key in used if key not in known and not CROSSREF.fullmatch(key)]


def crossrefs(path, nb):
    here = [label for label in labels(nb) if label]
    used = [ref for text in prose(nb) for ref in re.findall(rf"(?<!\w)@({CROSSREF.pattern})", text)]
    faults = [f"@{ref} has no label" for ref in used if ref not in here]
    faults += [f"the label {label} stands twice" for label in set(here) if here.count(label) > 1]
    for cell in map(directives, cells(nb, "code")):
        kind = cell.get("label", "")[:3]
        faults += [f"{cell['label']} has no {kind}-cap"] if kind in ("fig", "tbl") and f"{kind}-cap" not in cell else []
    return faults


def outputs(path, nb):
    stored = [out for c in cells(nb, "code") for out in c["outputs"]]
    faults = [f"a stored error: {out['ename']}" for out in stored if out["output_type"] == "error"]
    faults += ["a stored widget" for out in stored if any("widget" in mime for mime in out.get("data", {}))]
    bars = [t for t in output_text(nb) if re.search(r"\r|\d+%\||\d(it/s|s/it)\b", t)]
    return faults + ["a stored progress bar" for _ in bars]


def png_size(output):
    "Width and height in pixels of an output's PNG, (0, 0) where it has none."
    png = base64.b64decode("".join(output.get("data", {}).get("image/png", "")))
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def thin_strips(path, nb):
    "A single row of many images, which a phone, 350 pixels wide, would show as a strip of hardly 50."
    shown = [(c, png_size(o)) for c in cells(nb, "code") if "show_images(" in source(c) for o in c["outputs"]]
    return [f"a strip of {width} x {height} pixels: give fewer columns in {source(c)[:60]!r}"
            for c, (width, height) in shown if 350 * height < 60 * width]


def wide_charts(path, nb):
    "A chart that a phone would shrink to less than half: `styles.css` lets it be scrolled. Grids have larger letters."
    return [f"a chart of {max(widths)} pixels: write '#| classes: wide' above {source(c)[:60]!r}"
            for c in cells(nb, "code") if "wide" not in directives(c).get("classes", "")
            and not re.search(r"show_(images|pairs)\(", source(c))
            and max(widths := [0, *(png_size(output)[0] for output in c["outputs"])]) > 700]


def size(path, nb):
    n = len(json.dumps(nb, ensure_ascii=False).encode())
    return [f"{n:,} bytes, more than {MAX_BYTES:,}"] if n > MAX_BYTES else []


def machine_paths(path, nb):
    pattern = r"(?<![\w.~<-])/(?:home|root|tmp|work|mnt|Users|private|content)/[\w./-]*"
    texts = [source(c) for c in nb["cells"]] + list(output_text(nb))
    return [f"the path of a machine: {m[0]}" for text in texts for m in re.finditer(pattern, text)]


def imports_alone(path, nb):
    "nbdev runs cells with imports to make the docs, so nothing else may stand in them."
    faults = []
    for cell in cells(nb, "code"):
        body = parsed(cell).body
        # a function of an exported cell may import what only it needs
        where = body if exported(cell) else [node for stmt in body for node in ast.walk(stmt)]
        has_import = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in where)
        others = [stmt for stmt in body if not isinstance(stmt, (ast.Import, ast.ImportFrom))]
        faults += [f"an import beside other code: {ast.unparse(others[0])[:60]!r}"] if has_import and others else []
    return faults


def short_cells(path, nb):
    "Exported definitions may be longer; what a reader runs may not."
    lines = [[line for line in source(c).splitlines() if line.strip() and not line.startswith("#|")]
             for c in cells(nb, "code") if not exported(c)]
    return [f"a cell of {len(c)} lines that opens with {c[0]!r}" for c in lines if len(c) > MAX_LINES]


def module(path, nb):
    "A notebook that exports names its module, and the module is there."
    names = [d["default_exp"] for d in map(directives, cells(nb, "code")) if "default_exp" in d]
    if not names:
        return ["exports without '#| default_exp'"] if any(map(exported, cells(nb, "code"))) else []
    file = Path("hybridvae", *names[0].split(".")).with_suffix(".py")
    return [] if (path.parents[1] / file).exists() else [f"{file} is missing: run nbdev_export"]


CHECKS = [title_cell, links, citations, crossrefs, outputs, size, machine_paths, imports_alone, short_cells, module,
          wide_charts, thin_strips]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_notebook(check, path):
    faults = check(path, json.loads(path.read_text()))
    assert not faults, f"{path.name}: " + "; ".join(faults)


# --- checks of the whole --------------------------------------------------------------------------------------------

def sidebar_entries(contents):
    for item in contents:
        yield from sidebar_entries(item["contents"]) if isinstance(item, dict) else [item]


def unlike(listed, present, where):
    listed, present = set(listed), set(present)
    return ([f"{name} is in {where} but not in nbs/" for name in sorted(listed - present)]
            + [f"{name} is in nbs/ but not in {where}" for name in sorted(present - listed)])


def test_sidebar():
    config = yaml.safe_load((NBS / "_quarto.yml").read_text())
    listed = sidebar_entries(config["website"]["sidebar"]["contents"])
    faults = unlike(listed, [p.name for p in NOTEBOOKS], "_quarto.yml")
    assert not faults, "; ".join(faults)


def map_rows(nb):
    "The rows of the table of notebooks on the home page: notebook -> module."
    text = "\n".join(map(source, nb["cells"]))
    return dict(re.findall(r"^\| \[[^\]]+\]\((\w+\.ipynb)\) \| (?:`([\w.]+)`)? *\|", text, flags=re.M))


def test_the_course_on_the_home_page_has_the_order_of_the_sidebar():
    text = "\n".join(map(source, json.loads((NBS / "index.ipynb").read_text())["cells"]))
    rows = re.findall(r"^\| (\d+) \| \[[^\]]+\]\((\w+\.ipynb)\) \|", text, flags=re.M)
    listed = sidebar_entries(yaml.safe_load((NBS / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    lessons = [name for name in listed if name not in ("index.ipynb", "00_glossary.ipynb")]
    assert [name for _, name in rows] == lessons[:len(rows)] and lessons[len(rows) - 1] == "07_report.ipynb"
    assert [int(number) for number, _ in rows] == list(range(len(rows)))


def default_exp(nb):
    return next((f"hybridvae.{d['default_exp']}" for d in map(directives, cells(nb, "code")) if "default_exp" in d), "")


def test_every_name_in_the_glossary_is_one_of_the_packages():
    text = "".join(map(source, json.loads((NBS / "00_glossary.ipynb").read_text())["cells"]))
    modules = {path.stem for path in (ROOT / "hybridvae").glob("*.py")}
    names = {name for name in re.findall(r"`(\w+\.[\w.]+)`", text) if name.split(".")[0] in modules}
    for module, *attributes in (name.split(".") for name in names):
        found = importlib.import_module(f"hybridvae.{module}")
        for attribute in attributes:
            assert hasattr(found, attribute), f"{module} has no {'.'.join(attributes)}"
            found = getattr(found, attribute)
    assert len(names) > 30


def test_lessons_lead_to_the_glossary():
    lessons = [path for path in NOTEBOOKS if re.match(r"0(0[c-f]|[1-5][abc]?)_", path.name)]
    assert len(lessons) == 11
    assert not [path.stem for path in lessons if "(00_glossary.ipynb" not in path.read_text()]


def test_map_of_notebooks():
    rows = map_rows(json.loads((NBS / "index.ipynb").read_text()))
    there = {p.name: default_exp(json.loads(p.read_text())) for p in NOTEBOOKS if p.stem != "index"}
    faults = unlike(rows, there, "the table of index.ipynb")
    faults += [f"{name} exports {there[name]!r}, the table says {rows[name]!r}"
               for name in rows.keys() & there.keys() if rows[name] != there[name]]
    assert not faults, "; ".join(faults)


def test_every_module_has_a_notebook():
    made = {default_exp(json.loads(p.read_text())).split(".")[-1] for p in NOTEBOOKS}
    assert not {p.stem for p in (ROOT / "hybridvae").glob("[!_]*.py")} - made


def test_a_module_imports_only_what_stands_above_it_on_the_home_page():
    rows = map_rows(json.loads((NBS / "index.ipynb").read_text()))
    modules = [name.removeprefix("hybridvae.") for name in rows.values()]
    for name, imports in import_graph().items():
        later = [other for other in imports if modules.index(other) > modules.index(name)]
        assert not later, f"hybridvae.{name} imports {', '.join(later)}, below it in the table of index.ipynb"


def test_the_picture_of_the_layers_is_current():
    assert PICTURE.read_text() == svg(import_graph()), "nbs/layers.svg is not what the modules import: run make readme"


def test_floors_and_direct_imports_of_a_small_package(tmp_path):
    files = {"low": "import math", "middle": "from .low import x", "side": "from hybridvae.low import x",
             "high": "def f():\n    from hybridvae.middle import y\n    from . import low",
             "_private": "from .high import f"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    graph = import_graph(tmp_path)
    assert graph == {"low": set(), "middle": {"low"}, "side": {"low"}, "high": {"middle", "low"}}
    assert floors(graph) == [["low"], ["middle", "side"], ["high"]]
    assert direct(graph)["high"] == {"middle"}
    assert all(f">{name}</text>" in svg(graph) for name in graph) and "Floor 3: high." in svg(graph)
    with pytest.raises(ValueError, match="circle: a, b"):
        floors({"a": {"b"}, "b": {"a"}})


def test_readme_is_current():
    assert (ROOT / "README.md").read_text() == readme(), "README.md is not what nbs/index.ipynb says: run make readme"


def test_the_first_page_says_what_the_records_say():
    cells = json.loads((NBS / "index.ipynb").read_text())["cells"]
    [found] = [source(cell) for cell in cells if cell["id"] == FOUND]
    assert found == first_page(), "the index is not what the records say: run make readme"
    assert (NBS / PAIRS).exists() and re.search(r"\d", found)


def test_pictures_of_the_tour_on_the_home_page_are_current():
    figures = tour_pictures()
    assert {path.name for path in figures} == {"tour-samples.png", "tour-film.png"}
    old = [path.name for path, png in figures.items() if path.read_bytes() != png]
    assert not old, f"{', '.join(old)}: not what 00_tour.ipynb stores: run make readme"


def test_readme_links():
    targets = re.findall(r"\]\((?![a-z]+:)([^)#]+)", (ROOT / "README.md").read_text())
    assert targets and not [t for t in targets if not (ROOT / t).exists()]


def test_references_are_complete():
    bib = (NBS / "refs.bib").read_text()
    entries = re.split(r"^(?=@)", bib, flags=re.M)[1:]
    assert len(set(bib_keys(bib))) == len(entries)
    for entry in entries:
        assert {"title", "author", "year", "url"} <= {*re.findall(r"^  (\w+) = \{.+\},$", entry, flags=re.M)}, entry


# --- each check on a planted fault ----------------------------------------------------------------------------------

def md(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def code(src, **output):
    return {"cell_type": "code", "metadata": {}, "source": src.splitlines(keepends=True),
            "outputs": [output] if output else []}


GOOD = [
    md("# Core\n\n> Seeds and records\n\n- toc: true"),
    code("#| default_exp core"),
    code("#| export\nimport math\n# the standard library\nfrom pathlib import Path"),
    code("#| export\ndef flow():\n    import nflows\n    return nflows" + "\n" * 20),
    md("## What it is {#sec-what}\nSee [next](01_next.ipynb#a-heading), [@kingma2014vae; @ho2020ddpm], @fig-a, "
       "@sec-what and @eq-e; write to me@example.org.\n```\n@nobody [x](none.ipynb)\n```\n"
       "$$x$$ {#eq-e}, `@torch.no_grad` and [up](#sec-what)"),
    code("#| label: fig-a\n#| fig-cap: As @ho2020ddpm\n%matplotlib inline\nplot()",
         output_type="stream", text=["loss 0.1\n"]),
]


@pytest.fixture
def nbs(tmp_path):
    "A small project with a notebook to link to."
    (tmp_path / "hybridvae").mkdir()
    (tmp_path / "hybridvae" / "core.py").touch()
    folder = tmp_path / "nbs"
    folder.mkdir()
    (folder / "refs.bib").write_text("@article{kingma2014vae,\n}\n@article{ho2020ddpm,\n}\n")
    (folder / "01_next.ipynb").write_text(json.dumps({"cells": [md("# Next"), md("## A heading")]}))
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_a_good_notebook(check, nbs):
    assert check(nbs / "00_core.ipynb", {"cells": GOOD}) == []


PNG_OF_800 = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (800).to_bytes(4, "big")
                              + (100).to_bytes(4, "big") + bytes(5)).decode()
FAULTS = [
    (title_cell, [], "first cell"),
    (title_cell, [md("## Core")], "opens with"),
    (title_cell, [md("# Core\n\nSome prose")], "holds 'Some prose'"),
    (links, [md("[x](02_gone.ipynb)")], "02_gone.ipynb leads nowhere"),
    (links, [md("![x](results/gone.png)")], "results/gone.png leads nowhere"),
    (links, [md('<img src="gone.png">')], "gone.png leads nowhere"),
    (links, [md("[x](01_next.ipynb#none)")], "names no heading"),
    (links, [md("[x](#none)")], "names no heading"),
    (citations, [md("as in [@nobody2020]")], "@nobody2020"),
    (citations, [md("[@kingma2014vae; @nobody2020]")], "@nobody2020"),
    (citations, [code("#| fig-cap: After @nobody2020\nplot()")], "@nobody2020"),
    (crossrefs, [md("see @fig-none")], "@fig-none has no label"),
    (crossrefs, [md("see [-@sec-none]")], "@sec-none has no label"),
    (crossrefs, [code("#| label: fig-a\n#| fig-cap: A"), code("#| label: fig-a\n#| fig-cap: B")], "stands twice"),
    (crossrefs, [code("#| label: tbl-a\nshow()")], "tbl-a has no tbl-cap"),
    (outputs, [code("x", output_type="error", ename="NameError")], "NameError"),
    (outputs, [code("x", output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}})], "widget"),
    (outputs, [code("x", output_type="stream", text=[" 50%|####   | 5/10 [00:01<00:01,  4.9it/s]"])], "progress bar"),
    (wide_charts, [code("plot()", output_type="display_data", data={"image/png": PNG_OF_800})], "800 pixels"),
    (thin_strips, [code("show_images(x)", output_type="display_data", data={"image/png": PNG_OF_800})], "800 x 100"),
    (size, [code("x", output_type="display_data", data={"image/png": "A" * MAX_BYTES})], "bytes"),
    (machine_paths, [code("open('/home/me/data.npy')")], "/home/me/data.npy"),
    (machine_paths, [code("x", output_type="stream", text=["saved ", "to /tmp/run\n"])], "/tmp/run"),
    (imports_alone, [code("import math\nmath.pi")], "math.pi"),
    (imports_alone, [code("#| export\nimport math\nx = 1")], "x = 1"),
    (imports_alone, [code("def f():\n    import math")], "def f"),
    (short_cells, [code("x = 1\n" * (MAX_LINES + 1))], "16 lines"),
    (module, [code("#| default_exp gone")], "gone.py is missing"),
    (module, [code("#| export\nx = 1")], "default_exp"),
]


@pytest.mark.parametrize("check, planted, says", FAULTS, ids=[f"{c.__name__}-{s}" for c, _, s in FAULTS])
def test_checks_find_a_planted_fault(check, planted, says, nbs):
    faults = check(nbs / "00_core.ipynb", {"cells": planted})
    assert len(faults) == 1 and says in faults[0]


def test_sidebar_and_map_find_what_is_missing():
    listed = sidebar_entries(["a.ipynb", {"section": "B", "contents": ["b.ipynb"]}])
    assert unlike(listed, ["b.ipynb", "c.ipynb"], "here") == ["a.ipynb is in here but not in nbs/",
                                                              "c.ipynb is in nbs/ but not in here"]
    table = md("| notebook | module |\n|---|---|\n| [Core](00_core.ipynb) | `hybridvae.core` | seeds |\n"
               "| [Report](07_report.ipynb) | | results |")
    assert map_rows({"cells": [table]}) == {"00_core.ipynb": "hybridvae.core", "07_report.ipynb": ""}
    assert default_exp({"cells": GOOD}) == "hybridvae.core"


def test_readme_points_links_into_nbs(tmp_path):
    cell = md("[a](00a_core.ipynb), [b](https://example.org), [c](#c)\n\n\n\nend")
    index = tmp_path / "index.ipynb"
    index.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    assert readme(index) == "[a](nbs/00a_core.ipynb), [b](https://example.org), [c](#c)\n\nend\n"
