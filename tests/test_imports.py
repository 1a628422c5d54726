"""What importing the package may need: not nbdev, not fastcore, nflows only to build a flow, and no torch for the CLI."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["hybridvae", *(f"hybridvae.{p.stem}" for p in sorted((ROOT / "hybridvae").glob("*.py")) if not p.stem.startswith("__"))]
PROGRAM = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}: raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
for name in {modules!r}: importlib.import_module(name)
"""


def imported(modules, without):
    "Import `modules` in a fresh interpreter in which the packages `without` cannot be imported."
    return subprocess.run([sys.executable, "-c", PROGRAM.format(modules=modules, blocked=without)],
                          cwd=ROOT, capture_output=True, text=True)


def test_the_package_imports_without_its_development_tools():
    assert len(MODULES) > 1
    run = imported(MODULES, without=["nbdev", "fastcore", "execnb", "nflows", "torch_fidelity", "diffusers", "IPython", "pytest"])
    assert run.returncode == 0, run.stderr


def test_the_command_line_starts_without_torch():
    run = imported(["hybridvae.cli"], without=["torch", "torchvision", "diffusers", "torchmetrics"])
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package, by", [("fastcore", "nbdev"), ("torch", "torchvision")])
def test_the_blocker_blocks(package, by):
    assert f"{package} is blocked" in imported([by], without=[package]).stderr
