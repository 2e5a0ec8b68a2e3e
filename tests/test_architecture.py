"""The map of the house, checked on the sources: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {
    "atomic_files",
    "checkpoint_fields",
    "devices",
    "interrupts",
    "launched",
    "per_model",
    "pretrained",
    "precision",
    "recipes",
    "safe_yaml",
    "terminal",
    "text",
}
PURE = {"data", "solvers", "metrics", "sharding"}
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"__init__", "cli", "launched"},
    "cli": {
        "__init__",
        "arguments",
        "commands",
        "runs",
        "callbacks",
        "planning",
        "module",
        "standalone",
        "reports",
        "edits",
        "locating",
        "editing",
        "preservation",
        "checkpoints",
        "models",
        *PURE,
        *LEAVES,
    },
    "adapters": LEAVES,
    "commands": {"arguments", *LEAVES},
    "arguments": {"config_errors", *LEAVES},
    "config_errors": LEAVES,
    "class_errors": {"config_errors"},
    "run_arguments": {"arguments", "callbacks", "data", "editing", "module"},
    "runs": {"arguments", "class_errors", "callbacks", "checkpoints", "commands", "module", "run_arguments", *LEAVES},
    "reports": {"editing", *PURE, *LEAVES},
    "planning": {
        "arguments",
        "run_arguments",
        "callbacks",
        "module",
        "replay",
        "editing",
        "preservation",
        "models",
        *PURE,
        *LEAVES,
    },
    "standalone": {
        "__init__",
        "checkpoints",
        "reports",
        "locating",
        "edits",
        "editing",
        "preservation",
        "models",
        *PURE,
        *LEAVES,
    },
    "callbacks": {"module", "replay", "reports", "edits", "editing", "preservation", "models", *PURE, *LEAVES},
    "module": {"module_state", "adapters", "data", "losses", "models", "optimizers", "sharding", *LEAVES},
    "module_state": {"adapters", "edits", *LEAVES},
    "losses": {"data"},
    "optimizers": {"sharding"},
    "locating": {"edits", "editing", "data", *LEAVES},
    "edits": {"__init__", "editing", "models", *PURE, *LEAVES},
    "editing": {"preservation", "models", *PURE, *LEAVES},
    "replay": {"data", *LEAVES},
    "preservation": {"models", "data", "solvers", "sharding", *LEAVES},
    "checkpoints": {"adapters", "edits", "models", "sharding", *LEAVES},
    "models": {"data", "sharding", *LEAVES},
    **{name: LEAVES for name in PURE},
    **{name: {"text", "interrupts"} - {name} for name in LEAVES},
    "__init__": set(),
}
"""What each part of the package may import besides itself."""


def module_name(path: Path) -> str:
    """``lit_moeedit.data.atlas`` for its file; a package has the name of its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lit_moeedit", *parts) if parts[0] == "callbacks" else parts)


FILES = {module_name(path): path for folder in ("lit_moeedit", "callbacks") for path in (ROOT / folder).rglob("*.py")}
every_file = pytest.mark.parametrize("name", sorted(FILES))


def part(module: str) -> str:
    """The part of the package that a module belongs to; ``__init__`` is the package itself."""
    return [*module.split("."), "__init__"][1]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node`` but what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for statement in child.orelse:  # type: ignore[attr-defined]
                yield from walk_at_run_time(statement)
        else:
            yield from walk_at_run_time(child)


def imported(source: ast.AST, name: str) -> set[str]:
    """Modules that ``source``, the code of module ``name``, imports when it runs."""
    found: set[str] = set()
    for node in walk_at_run_time(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            # `from lit_moeedit import data` imports a part, too
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "lit_moeedit" else {origin}
    return found


def holds_data(node: ast.AST) -> bool:
    """Whether a chain of attributes, calls and subscripts goes through ``.data`` of something else than ``self``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Attribute) and node.attr == "data" and ast.unparse(node.value) != "self":
            return True
        node = node.func if isinstance(node, ast.Call) else node.value
    return False


def writes(source: ast.AST) -> list[int]:
    """Lines that write through ``.data``: by assignment, or by a method that works in place."""
    lines = []
    for node in ast.walk(source):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            if method.endswith("_") and not method.endswith("__"):
                targets.append(node.func.value)
        flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        lines += [target.lineno for target in flat if holds_data(target)]  # type: ignore[attr-defined]
    return lines


def test_the_files_are_there() -> None:
    assert {part(name) for name in FILES} == set(MAY_IMPORT)


@every_file
def test_imports_only_downwards(name: str) -> None:
    own = part(name)
    used = {part(module) for module in imported(tree(name), name) if module.split(".")[0] == "lit_moeedit"}
    upwards = used - MAY_IMPORT[own] - {own}
    assert not upwards, f"{name} imports {sorted(upwards)}; {own} may import {sorted(MAY_IMPORT[own])} and itself"


@every_file
def test_callbacks_are_imported_by_their_real_name(name: str) -> None:
    assert not {module for module in imported(tree(name), name) if module.split(".")[0] == "callbacks"}


@every_file
def test_only_sharding_writes_through_data(name: str) -> None:
    lines = writes(tree(name))
    # the parameters of the simulator hold no elements
    may_write = part(name) == "sharding" or name == "lit_moeedit.planning.simulated_zero"
    assert may_write or not lines, f"{name} writes through .data in lines {lines}"


@every_file
def test_nothing_that_hides_or_runs_anything(name: str) -> None:
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("print", "eval", "exec", "breakpoint"):
                found.append(f"{node.func.id}() in line {node.lineno}")
        elif isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if node.type is None or (everything and silent):
                found.append(f"an except that hides everything in line {node.lineno}")
    refused = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    found += [f"import of {module}" for module in imported(tree(name), name) if module.split(".")[0] in refused]
    assert not found, f"{name}: {', '.join(found)}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from lit_moeedit.editing import Editor", {"lit_moeedit.editing"}),
        ("from lit_moeedit import editing", {"lit_moeedit.editing"}),
        ("def f():\n    import lit_moeedit.cli", {"lit_moeedit.cli"}),
        ("from ..editing import Editor", {"lit_moeedit.editing"}),
        ("if TYPE_CHECKING:\n    from lit_moeedit.editing import Editor\nelse:\n    import ast", {"ast"}),
    ],
)
def test_imports_are_seen(code: str, expected: set[str]) -> None:
    assert imported(ast.parse(code), "lit_moeedit.solvers.bcd") == expected


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("weight.data[3].copy_(value)", True),
        ("weight.data = value", True),
        ("a, layer.weight.data[1:] = values", True),
        ("weight.data[0] += value", True),
        ("weight.data.view(-1).add_(value)", True),
        ("value = weight.data[3].clone()", False),
        ("self.data = data", False),
        ("weight[3].copy_(value)", False),
    ],
)
def test_writes_are_seen(code: str, found: bool) -> None:
    assert bool(writes(ast.parse(code))) is found
