"""The package as it is installed, from a checkout and from a wheel, and its public names."""

from __future__ import annotations

import ast
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

import lit_moeedit

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lit_moeedit", "callbacks")
CONFIGS = {path.name for path in (ROOT / "configs").iterdir()}
PUBLIC = """
lit_moeedit: Atlas BlockCoordinateDescent Corpus CovariancePenalty Edit EditEvent EditHold EditListener EditMemory
    EditMethod EditProblem EditReplay EditReport EditResult EditSuccess Editor Evaluation ExpertDeltas ExpertLoad Fact
    FactsCorpus FactsDataModule FactsError FineTuning KnowledgeEditing LitMoE Neighbour NullSpace OutputPenalty
    PerExpertRidge Preservation RoutingDivergence RoutingMonitor RoutingSimilarity Schedule Solver TargetOptimizer
    Tucker Woodbury __version__ edit evaluate read_edits read_facts regathering validate_facts
lit_moeedit.callbacks: EditEvent EditHold EditListener EditReplay EditReport EndTogether KnowledgeEditing RoutingMonitor
    Schedule
lit_moeedit.data: Atlas CheckedFacts Corpus Fact FactError FactsCorpus FactsDataModule FactsError Neighbour Probe
    Statement neutral_texts read_facts validate_facts
lit_moeedit.editing: EditMemory EditMethod EditResult Editor Evaluation FailedEditError FineTuning Location Measured
    Moment MomentsCache PHASES Place SecondMoments TargetOptimizer Targets Trace answers evaluate locate
    neighbour_groups perplexity score second_moments trace
lit_moeedit.edits: Autopsy Edit EditConflictError EditFileError LayerChange Placement Presence SavedEdits State apply
    autopsy layers_by_parameter read_edits states to_peft undo verify
lit_moeedit.metrics: CopyAccuracy EditSuccess ExpertLoad Fluency GenerationMatch ProbabilityGap ProbeAccuracy
    RoutingDivergence RoutingSimilarity WeightGrowth bootstrap_interval copy_accuracy edit_success expert_load
    generation_match ngram_entropy probability_gap probe_accuracy routing_divergence routing_similarity weight_growth
lit_moeedit.planning: Cost CostCounter ExpertParallelCost FakeFloatMode Workload empty_model simulate
lit_moeedit.preservation: CovariancePenalty MomentsCache NullSpace OutputPenalty Preservation SecondMoments Shaping
lit_moeedit.reports: ConsoleReport Cost FactRow Guard Held LossByPart Measured MissingAutopsy Model Moment Outcome
    PartPutBack Place Replayed Report Retention Routing State SurvivalPoint Survivors Totals facts_table markdown
    outcome_of read_rows write_report write_rows
lit_moeedit.solvers: BlockCoordinateDescent EditProblem ExpertDeltas LayerWeights PerExpertRidge Solver Tucker
    TuckerFactors Woodbury
lit_moeedit.standalone: TooFewFactsError edit
"""
"""Every public name. Who adds one here promises to keep it; who takes one away breaks somebody's code."""


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what is published, so that the checkout gets no build folders."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in (*PACKAGES, "configs"):
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
    assert set(settings["packages"]) == expected | {"lit_moeedit.configs"}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_the_oldest_versions_that_are_promised_are_tested(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = pyproject["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    for bound in bounds:
        name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", bound).groups()  # type: ignore[union-attr]
        found = pinned[name.lower()]
        assert found == version or re.fullmatch(rf"{re.escape(version)}(\.0)+", found), (bound, found)


def test_a_wheel_holds_every_source_and_the_table(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"lit_moeedit/{name}" for name in sources("lit_moeedit")}
    expected |= {f"lit_moeedit/callbacks/{name}" for name in sources("callbacks")}
    expected |= {f"lit_moeedit/configs/{name}" for name in CONFIGS}
    expected |= {f"lit_moeedit/data/{name}" for name in ("atlas.tsv", "neutral.txt", "rivers.tsv")} | {
        "lit_moeedit/py.typed"
    }
    expected |= {f"lit_moeedit/reports/templates/page.{kind}" for kind in ("html", "css", "js")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    metadata = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= metadata


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the wheel is unpacked, and what a process finds that imports it from there."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import json
import lit_moeedit.callbacks
import lit_moeedit.sharding.cpu_strategy
from lightning.pytorch.strategies import StrategyRegistry
from lit_moeedit.data import Atlas
from lit_moeedit.recipes import recipe_path
missing = [name for name in lit_moeedit.__all__ if not hasattr(lit_moeedit, name)]
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "lit_moeedit"]
files.append(str(recipe_path("atlas")))
strategies = StrategyRegistry.available_strategies()
deepspeed = "deepspeed" in sys.modules
print(json.dumps({{"files": files, "missing": missing, "edits": len(Atlas(edits=2).edits), "strategies": strategies,
                  "deepspeed": deepspeed}}))
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_wheel_imports_from_where_it_is_unpacked(unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, found = unpacked
    assert found["missing"] == [] and found["edits"] == 2
    assert {str(Path(file).resolve().is_relative_to(folder.resolve())) for file in found["files"]} == {"True"}
    assert str(folder / "lit_moeedit" / "callbacks" / "__init__.py") in found["files"]


def test_the_trainer_knows_the_stages_without_deepspeed(unpacked: tuple[Path, dict[str, Any]]) -> None:
    _, found = unpacked
    assert {f"deepspeed_cpu_stage_{stage}" for stage in range(4)} <= {*found["strategies"]}
    assert not found["deepspeed"]


IN_A_CHECKOUT = """
import importlib.util
import json
import sys
def origin(name):
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return spec and (spec.origin or list(spec.submodule_search_locations)[0])
names = ("", ".callbacks", ".configs", ".tests", ".benchmarks", ".lit_moeedit")
found = {name: origin("lit_moeedit" + name) for name in names}
print(json.dumps({"found": found, "torch": "torch" in sys.modules, "path": len(sys.modules["lit_moeedit"].__path__)}))
"""


def test_a_checkout_is_taken_whole_where_another_version_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Python puts the working directory before what is installed, and ``lit_moeedit/`` there has no callbacks in it."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, "-c", IN_A_CHECKOUT]
    # without site: an editable install would find the callbacks of its own checkout
    command.insert(1, "-S")
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["found"] == {
        "": str(ROOT / "lit_moeedit" / "__init__.py"),
        ".callbacks": str(ROOT / "callbacks" / "__init__.py"),
        ".configs": str(ROOT / "configs"),
        ".tests": None,
        ".benchmarks": None,
        ".lit_moeedit": None,
    }
    # the package imports nothing outside of the standard library; and there is no second place to find anything in
    assert not answer["torch"] and answer["path"] == 1
    outside = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert json.loads(outside.stdout)["found"][".callbacks"] == str(tmp_path / "lit_moeedit/callbacks/__init__.py")


def test_the_public_names_are_these() -> None:
    expected: dict[str, list[str]] = {}
    for word in PUBLIC.split():
        if word.endswith(":"):
            names = expected.setdefault(word.removesuffix(":"), [])
        else:
            names.append(word)
    for module, names in expected.items():
        found = importlib.import_module(module)
        assert sorted(found.__all__) == sorted(names), module
        assert all(getattr(found, name) is not None for name in names)


def test_a_name_is_the_same_object_everywhere() -> None:
    from lit_moeedit import EditEvent, Editor, KnowledgeEditing, callbacks, editing

    assert callbacks.KnowledgeEditing is KnowledgeEditing and callbacks.EditEvent is EditEvent
    assert editing.Editor is Editor and set(lit_moeedit.__all__) <= set(dir(lit_moeedit))
    folder = ROOT / "callbacks"
    copies = [name for name, module in sys.modules.items()
              if Path(str(getattr(module, "__file__", ""))).is_relative_to(folder)]  # fmt: skip
    assert all(name.startswith("lit_moeedit.callbacks") for name in copies)
    with pytest.raises(AttributeError, match="has no attribute 'Edtor'"):
        lit_moeedit.Edtor  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((ROOT / "lit_moeedit" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    declared = {
        alias.asname: f"{node.module}".removeprefix("lit_moeedit.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == lit_moeedit._MODULES


def test_the_package_is_imported_without_what_takes_time() -> None:
    code = "import sys, lit_moeedit; print(lit_moeedit.__version__, *{'torch', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert done.stdout.split() == [project["version"]]
    command = [sys.executable, "-X", "importtime", "-m", "lit_moeedit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"lit-moeedit {project['version']}\n" and " torch" not in done.stderr


def test_extras_and_script_exist(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert set(project["optional-dependencies"]) == {"wandb", "plots", "deepspeed", "peft", "test", "docs", "dev"}
    assert project["scripts"] == {"lit-moeedit": "lit_moeedit.__main__:main"}
    assert callable(importlib.import_module("lit_moeedit.__main__").main)


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
