"""The package as others get it: a wheel of the tracked files, opened by a fresh interpreter in another folder."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_INHERITED = ("PYTHONPATH", "HYBRIDVAE_WEIGHTS", "HYBRIDVAE_RUNS", "HYBRIDVAE_COMMIT")


def tracked_files():
    "The files that git tracks or would; skips where there is no repository."
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the repository, to know its files")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def built_from(source, to):
    "The wheel of a source tree."
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--disable-pip-version-check", "--wheel-dir", str(to), "."], cwd=source, check=True)
    [wheel] = to.glob("hybridvae-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder that holds the package as its wheel installs it, inside a repository of somebody else."
    base = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (base / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, base / "source" / name)
    wheel = built_from(base / "source", base)
    shutil.rmtree(base / "source")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(base / "site")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(base)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "another project"], check=True)
    return base / "site"


def run(installed, *words):
    "What Python prints when it is started elsewhere, with the installed package first on its path."
    env = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    done = subprocess.run([sys.executable, *words], cwd=installed.parent, env=env | {"PYTHONPATH": str(installed)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_weights_records_and_types(installed):
    package = installed / "hybridvae"
    assert (package / "py.typed").is_file() and not (installed / "weights").exists()
    for part in ("weights", "nbs/results"):
        tracked = {name for name in tracked_files() if name.startswith(f"{part}/")}
        carried = {p.relative_to(package).as_posix() for p in (package / part).rglob("*") if p.is_file()}
        assert tracked and tracked == carried


def test_shipped_weights_open_by_name_and_records_are_found(installed):
    program = """if True:
        import hybridvae
        from hybridvae.core import load_records, provenance
        from hybridvae.records import results_folder
        print(hybridvae.__file__)
        print(type(hybridvae.load("scenes-diffusevae")).__name__, len(load_records(results_folder())) > 20)
        print(provenance()["commit"], provenance()["dirty"])
    """
    file, found, commit = run(installed, "-c", program).splitlines()
    assert Path(file) == installed / "hybridvae" / "__init__.py" and found == "DiffuseVAE True"
    assert commit == "none (release 0.1.0) True"


def test_the_command_draws_from_shipped_weights(installed, tmp_path):
    run(installed, "-m", "hybridvae", "sample", "--weights", "scenes-diffusevae", "--n", "2", "--steps", "2",
        "--cpu", "--out", str(tmp_path / "two.png"))
    assert (tmp_path / "two.png").stat().st_size > 100
