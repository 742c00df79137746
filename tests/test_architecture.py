"""Every import points down: packages stand on floors, and no file imports a higher floor or itself in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import captum_intramodal

ROOT = Path(captum_intramodal.__file__).parent
PACKAGE = captum_intramodal.__name__

# docs/architecture.md draws them; the lowest first. What shares a floor does not import its neighbors.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors"),
    ("_utils", "text", "demo"),
    ("models", "functional", "datasets", "viz"),
    ("geometry",),
    ("adapter",),
    ("attr", "metrics"),
    ("explanation",),
    ("explainers",),
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported_modules(name: str) -> set[str]:
    """The package's modules that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else str(node.module)
                for alias in node.names
            }
    return {module for module in found if module.split(".")[0] == PACKAGE} - {name}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_floor() -> None:
    assert {part_of(module) for module in MODULES} - {""} == set(FLOOR_OF)


def test_imports_point_down() -> None:
    upward = [
        f"{module} -> {other}"
        for module in MODULES
        if part_of(module)
        for other in imported_modules(module)
        if part_of(other)
        and part_of(other) != part_of(module)
        and FLOOR_OF[part_of(other)] >= FLOOR_OF[part_of(module)]
    ]
    assert not upward


def test_no_module_imports_itself_in_a_circle() -> None:
    # A package's face imports its modules, which may import each other: faces are left out.
    faces = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    graph = {name: imported_modules(name) - faces for name in MODULES if name not in faces}
    assert list(TopologicalSorter(graph).static_order())


def test_only_the_adapter_handles_processors() -> None:
    for part in ("functional", "text", "viz"):
        for module in (name for name in MODULES if part_of(name) == part):
            assert not any(part_of(other) == "models" for other in imported_modules(module)), module
            assert "transformers" not in MODULES[module].read_text(encoding="utf-8").split('"""')[2], module
