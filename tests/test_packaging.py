"""What is shipped: the package list, the pins, and a wheel tested far from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# The folders that the package lies in, and the paths that they are installed under.
FOLDERS = {"revlib": Path("revlib"), "kernels": Path("revlib/kernels")}

MODULES = {
    (installed / module.relative_to(ROOT / folder)).as_posix()
    for folder, installed in FOLDERS.items()
    for module in (ROOT / folder).rglob("*.py")
}


def test_package_list_names_every_folder_of_modules():
    folders = {Path(module).parent.as_posix().replace("/", ".") for module in MODULES}

    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_package_has_an_init():
    assert {f"{Path(module).parent.as_posix()}/__init__.py" for module in MODULES} <= MODULES


def test_core_depends_on_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


PINNED = {
    "build": PYPROJECT["build-system"]["requires"],
    "core": PROJECT["dependencies"],
    **PROJECT["optional-dependencies"],
}


@pytest.mark.parametrize("group", PINNED)
def test_pins_satisfy_the_requirements(group):
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}

    for requirement in map(Requirement, PINNED[group]):
        if requirement.name != PROJECT["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout with an sdist and a wheel in dist/, built without network."""
    # A copy, since whatever earlier builds left in the checkout would be shipped too.
    source = tmp_path_factory.mktemp("build") / "source"
    leftovers = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source


@pytest.fixture(scope="module")
def wheel(source):
    (wheel,) = source.glob("dist/*.whl")
    return wheel


@pytest.fixture(scope="module")
def outside(source, tmp_path_factory):
    """A folder with all that the sdist holds except the package, which must come installed."""
    (sdist,) = source.glob("dist/*.tar.gz")
    outside = tmp_path_factory.mktemp("outside")
    run("tar", "-xzf", sdist, "--strip-components=1", cwd=outside)
    for folder in FOLDERS:
        shutil.rmtree(outside / folder, ignore_errors=True)
    return outside


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment that has the wheel, and borrows the rest from this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=environment)
    # Python reads no .pth file in a folder that a .pth file adds, so the editable install
    # in this environment stays out of reach.
    purelib = sysconfig.get_path("purelib", "venv", vars={"base": str(environment)})
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(*command, cwd):
    """Runs a command and returns what it printed, which is also what a failure shows."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_the_modules_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert names == MODULES | {"revlib/py.typed"}


@pytest.mark.slow
def test_installed_package_is_imported_from_its_environment(python, outside):
    printed = run(python, "-c", "import revlib; print(revlib.__file__)", cwd=outside)

    assert Path(printed.strip()).is_relative_to(python.parents[1])


@pytest.mark.slow
def test_installed_core_imports_no_extra(python, outside):
    extras = "accelerate datasets matplotlib numpy PIL rich sklearn triton typer".split()
    script = f"""
import sys, torch
sys.modules.update(dict.fromkeys({extras}))  # a module that is None cannot be imported
import revlib.memory, revlib.models, revlib.testing
revlib.functional.affine_coupling(torch.zeros(1, 1), torch.zeros(1, 2))
"""

    run(python, "-c", script, cwd=outside)


@pytest.mark.slow
def test_installed_command_prints_its_help(python, outside):
    assert "train" in run(python.with_name("revlib"), "--help", cwd=outside)


@pytest.mark.slow
def test_every_twentieth_fast_test_passes_against_the_installed_package(python, outside):
    pytest_command = (python, "-m", "pytest", "tests", "--ignore=tests/test_packaging.py")

    run(*pytest_command, "-m", "not slow", "--part", "1/20", cwd=outside)
