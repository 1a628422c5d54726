"""What importing the package may need, and what it offers at its top.

It needs neither nbdev nor fastcore, nflows only to build a flow, and no torch for the command line or for
`import hybridvae`; its public names are imported when they are first used.
"""
import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import hybridvae
import pytest
from hybridvae import core

ROOT = Path(__file__).parents[1]
STEMS = sorted(p.stem for p in (ROOT / "hybridvae").glob("*.py") if not p.stem.startswith("__"))
MODULES = ["hybridvae", *(f"hybridvae.{stem}" for stem in STEMS)]
PROGRAM = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}: raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
for name in {modules!r}: importlib.import_module(name)
"""


def fresh(program):
    "A new interpreter that runs this program."
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def imported(modules, without):
    "Import `modules` in a fresh interpreter in which the packages `without` cannot be imported."
    return fresh(PROGRAM.format(modules=modules, blocked=without))


def test_the_package_imports_without_its_development_tools():
    assert len(MODULES) > 1
    tools = ["nbdev", "fastcore", "execnb", "nflows", "torch_fidelity", "diffusers", "IPython", "pytest"]
    run = imported(MODULES, without=tools)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", ["hybridvae", "hybridvae.cli"])
def test_the_package_and_the_command_line_start_without_torch(module):
    run = imported([module], without=["torch", "torchvision", "diffusers", "torchmetrics", "numpy"])
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package, by", [("fastcore", "nbdev"), ("torch", "torchvision")])
def test_the_blocker_blocks(package, by):
    assert f"{package} is blocked" in imported([by], without=[package]).stderr


# --- the names at the top -------------------------------------------------------------------------------------------

def names_for_type_checkers():
    "Name -> module, as `if TYPE_CHECKING` imports them."
    tree = ast.parse((ROOT / "hybridvae" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module.removeprefix("hybridvae.") for node in block.body for alias in node.names}


def test_every_public_name_is_what_its_module_defines():
    assert hybridvae.PUBLIC_NAMES == names_for_type_checkers()
    assert hybridvae.PUBLIC_NAMES.keys() <= {*hybridvae.__all__} & {*dir(hybridvae)}
    for name, module in hybridvae.PUBLIC_NAMES.items():
        value = getattr(hybridvae, name)
        assert value is getattr(importlib.import_module(f"hybridvae.{module}"), name)
        assert value.__module__ == f"hybridvae.{module}"


def test_every_model_class_of_the_package_is_in_the_table():
    for module in map(importlib.import_module, MODULES[1:]):
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and issubclass(cls, core.Model) and cls.__module__ == module.__name__
            if own and cls.__init__ is not core.Model.__init__:  # base classes have nothing to build
                assert f"hybridvae.{hybridvae.MODEL_MODULES.get(name)}" == module.__name__, name


def test_another_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="'hybridvae' has no attribute 'VEA'"):
        _ = hybridvae.VEA
    with pytest.raises(ImportError, match="VEA"):
        exec("from hybridvae import VEA")


def test_a_name_is_imported_on_first_use_and_only_its_modules():
    run = fresh("import sys, hybridvae\nassert 'torch' not in sys.modules and 'VAE' in dir(hybridvae)\n"
                "from hybridvae import VAE\nassert VAE.__module__ == 'hybridvae.vae'\n"
                "assert 'hybridvae.latent' not in sys.modules and 'VAE' in vars(hybridvae)")
    assert run.returncode == 0, run.stderr


def test_weights_and_configs_of_every_class_open_in_a_fresh_interpreter():
    run = fresh("from hybridvae.core import MODEL_MODULES, load, model_class, weights_folder\n"
                "for path in sorted(weights_folder().glob('*.safetensors')): print(type(load(path.stem)).__name__)\n"
                "assert [model_class(name).__name__ for name in MODEL_MODULES] == [*MODEL_MODULES]")
    assert run.returncode == 0, run.stderr
    assert {"DiffuseVAE", "AdaptiveDiffuseVAE", "LatentDiffusion", "Classifier"} <= {*run.stdout.split()}


@pytest.mark.parametrize("path", sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "tests").glob("*.py")]),
                         ids=lambda p: p.stem)
def test_what_notebooks_and_tests_import_from_the_package_exists(path):
    if path.suffix == ".py":
        parts = [path.read_text()]
    else:
        cells = json.loads(path.read_text())["cells"]
        parts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for tree in map(ast.parse, parts):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybridvae"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or f"{node.module}.{alias.name}" in MODULES, alias.name
