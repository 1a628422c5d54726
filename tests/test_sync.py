"""The package is what the notebooks export, and the notebooks are clean.

Both are tried on a copy, so that a check never changes your files and asks nothing about what is committed.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBDEV = ["settings.ini", "pyproject.toml"]
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev_export does nothing where it is set


def nbdev(command, project):
    words = [Path(sys.executable).with_name(command)]
    subprocess.run(words, cwd=project, env=ENV, check=True, capture_output=True, text=True)


def copied(project, to):
    "The notebooks and nbdev's settings, without package and run records."
    for name in NBDEV:
        shutil.copy(project / name, to / name)
    (to / "nbs").mkdir()
    for notebook in (project / "nbs").glob("[!_]*.ipynb"):
        shutil.copy(notebook, to / "nbs")
    return to


def differing(a, b, pattern):
    names = {p.name for folder in (a, b) for p in folder.glob(pattern)}
    content = lambda folder, name: (folder / name).read_bytes() if (folder / name).exists() else None
    return sorted(name for name in names if content(a, name) != content(b, name))


def out_of_step(project, tmp_path):
    "The modules that differ from what `nbdev_export` makes of the notebooks alone."
    copy = copied(project, tmp_path)
    nbdev("nbdev_export", copy)
    return differing(project / "hybridvae", copy / "hybridvae", "*.py")


def unclean(project, tmp_path):
    "The notebooks that `nbdev_clean` would change."
    copy = copied(project, tmp_path)
    nbdev("nbdev_clean", copy)
    return differing(project / "nbs", copy / "nbs", "[!_]*.ipynb")


def test_package_is_what_the_notebooks_export(tmp_path):
    names = out_of_step(ROOT, tmp_path)
    assert not names, (f"hybridvae/{names[0]} is not what the notebooks export: make the change in its notebook, "
                       f"then run .venv/bin/nbdev_export ({len(names)} of this kind: {', '.join(names)})")


def test_notebooks_are_clean(tmp_path):
    names = unclean(ROOT, tmp_path)
    assert not names, (f"nbs/{names[0]} holds traces of a machine: run .venv/bin/nbdev_clean "
                       f"({len(names)} of this kind: {', '.join(names)})")


@pytest.fixture
def project(tmp_path):
    "A project of one notebook, in step and clean."
    root = tmp_path / "project"
    root.mkdir()
    for name in NBDEV:
        shutil.copy(ROOT / name, root / name)
    (root / "nbs").mkdir()
    sources = ["#| default_exp small", "#| export\ndef one(): return 1"]
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": s, "outputs": [], "execution_count": None}
             for i, s in enumerate(sources)]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "nbs" / "00_small.ipynb").write_text(json.dumps(notebook))
    nbdev("nbdev_export", root)
    nbdev("nbdev_clean", root)
    return root


def fresh(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_an_edited_or_left_over_module_is_found(project, tmp_path):
    assert out_of_step(project, fresh(tmp_path, "good")) == []
    module = project / "hybridvae" / "small.py"
    module.write_text(module.read_text().replace("return 1", "return 2"))
    (project / "hybridvae" / "renamed.py").touch()
    assert out_of_step(project, fresh(tmp_path, "bad")) == ["renamed.py", "small.py"]
    assert "return 2" in module.read_text()  # the check changed nothing


def test_an_unclean_notebook_is_found(project, tmp_path):
    assert unclean(project, fresh(tmp_path, "good")) == []
    notebook = project / "nbs" / "00_small.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert unclean(project, fresh(tmp_path, "bad")) == ["00_small.ipynb"]
