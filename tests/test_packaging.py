"""The package as it is installed: from a checkout, and from a wheel."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lit_moeedit", "callbacks")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what is published, so that the checkout gets no build folders."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("lit_moeedit-*.whl")
    return built


def sources(folder: str) -> set[str]:
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


def test_a_checkout_finds_the_callbacks_in_their_folder() -> None:
    package, callbacks = (importlib.import_module(name) for name in ("lit_moeedit", "lit_moeedit.callbacks"))
    if not Path(str(package.__file__)).is_relative_to(ROOT):
        pytest.skip("lit_moeedit is not installed from this checkout")
    assert Path(str(callbacks.__file__)).resolve() == ROOT / "callbacks" / "__init__.py"
    assert callbacks.__name__ == "lit_moeedit.callbacks"
    for name in sources("callbacks") - {"__init__.py"}:
        module = importlib.import_module(f"lit_moeedit.callbacks.{name.removesuffix('.py').replace('/', '.')}")
        assert Path(str(module.__file__)).resolve() == ROOT / "callbacks" / name


def test_every_folder_of_sources_is_a_listed_package(pyproject: dict[str, Any]) -> None:
    settings = pyproject["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    mapped = {folder: package for package, folder in settings["package-dir"].items()}
    expected = {mapped.get(folder, folder.replace("/", ".")) for folder in folders}
    assert set(settings["packages"]) == expected
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_a_wheel_holds_every_source_and_the_table(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"lit_moeedit/{name}" for name in sources("lit_moeedit")}
    expected |= {f"lit_moeedit/callbacks/{name}" for name in sources("callbacks")}
    expected |= {"lit_moeedit/data/atlas.tsv", "lit_moeedit/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    metadata = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= metadata


def test_a_wheel_imports_from_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import json
import lit_moeedit.callbacks
from lit_moeedit.callbacks import __all__ as names
from lit_moeedit.data import Atlas
missing = [name for name in names if not hasattr(lit_moeedit.callbacks, name)]
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "lit_moeedit"]
print(json.dumps({{"files": files, "missing": missing, "edits": len(Atlas(edits=2).edits)}}))
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == [] and found["edits"] == 2
    assert {str(Path(file).resolve().is_relative_to(tmp_path.resolve())) for file in found["files"]} == {"True"}
    assert str(tmp_path / "lit_moeedit" / "callbacks" / "__init__.py") in found["files"]


def test_extras_and_script_exist(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert set(project["optional-dependencies"]) == {"wandb", "deepspeed", "test", "dev"}
    assert project["scripts"] == {"lit-moeedit": "lit_moeedit.cli:main"}
    assert callable(importlib.import_module("lit_moeedit.cli").main)


def test_every_requirement_has_a_tested_version(pyproject: dict[str, Any]) -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    project = pyproject["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert {normal(name) for name in wanted} - {project["name"]} <= {normal(pin) for pin in pins}
