"""Adds to a wheel what a clone has beside the package: shipped weights, committed records and the report's notebook.

Everything else about the build stands in pyproject.toml. An editable install leaves the files where they are.
"""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DATA = ("weights/*.safetensors", "nbs/results/**/*", "nbs/07_report.ipynb", "nbs/refs.bib")  # `core.project_root`


class BuildWithData(build_py):
    "Build the package, then copy the data into it: `weights/x` becomes `hybridvae/weights/x`."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for file in filter(Path.is_file, (path for pattern in DATA for path in ROOT.glob(pattern))):
            target = Path(self.build_lib, "hybridvae", file.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithData})
