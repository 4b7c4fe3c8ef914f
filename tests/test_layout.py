"""The house stands: who may import whom, in which order, and what the wheel must list."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("tautomer", "rewrite", "passes", "backends", "nn")
in_checkout = pytest.mark.skipif(not (ROOT / "rewrite").is_dir(), reason="the layout is the checkout's, not the wheel's")
pytestmark = in_checkout


def sources() -> list[Path]:
    return sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Level and dotted name of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


ARROWS = {"tautomer": {"tautomer", "rewrite", "passes", "backends", "nn"}, "passes": {"rewrite", "passes"},
          "backends": {"rewrite", "backends"}, "nn": {"rewrite"}, "rewrite": {"rewrite"}}  # fmt: skip


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for level, name in imports(path):
        if level == 0 and name.split(".")[0] == "tautomer":
            reached = name.split(".")[1] if "." in name else "tautomer"
            assert reached in ARROWS[own], f"{path.name} reaches from {own} into {reached}"
            assert reached != own or own in ("passes", "tautomer"), f"{path.name}: imports inside {own} are relative"
        assert name.split(".")[0] != "rewrite", f"{path.name} imports a top-level 'rewrite'"


def reading_order(folder: Path) -> list[str]:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return re.findall(r"^    (\w+)\.py", text, re.MULTILINE)


@pytest.mark.parametrize("part", ["rewrite", "backends/python"])
def test_a_part_has_one_reading_order(part: str) -> None:
    folder = ROOT / part
    order = reading_order(folder)
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(order) == files, f"not in the reading order: {files ^ set(order)}"
    for name in order:
        for level, module in imports(folder / f"{name}.py"):
            if level == 1:
                assert order.index(module.split(".")[0]) < order.index(name), f"{name}.py imports {module}.py, which comes later"


def private_names(path: Path) -> set[str]:
    """Dotted names below ``torch`` with a private part; ``torch._ops`` is the type of every op and has no public name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"torch(\.\w+)+", dotted) and not dotted.startswith(("torch.ops.", "torch._ops")):
            found |= {dotted} if re.search(r"\._(?!_)", dotted) else set()
    return found | {name for _, name in imports(path) if re.match(r"torch\b.*\._", name) and not name.startswith("torch._ops")}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_torch_stand_in_one_file(path: Path) -> None:
    assert path.name == "_torch.py" or not private_names(path)


def packages() -> dict[str, str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(config["packages"]) == set(config["package-dir"])
    return dict(config["package-dir"])


def test_the_wheel_lists_every_package() -> None:
    listed = {ROOT / folder for folder in packages().values()}
    present = {path.parent for path in sources()}
    assert present == listed
    for name, folder in packages().items():
        assert name == "tautomer" or name == "tautomer." + folder.replace("/", ".")
        assert (ROOT / folder / "__init__.py").exists()


def test_links_mirror_the_package() -> None:
    links = {path.name: path.resolve() for path in (ROOT / ".links/tautomer").iterdir()}
    files = {path.name: path for path in (ROOT / "tautomer").glob("*.py")}
    parts = {part: ROOT / part for part in PARTS[1:]}
    assert links == {name: path.resolve() for name, path in (files | parts).items()}


def test_no_file_is_called_like_a_package_or_its_function() -> None:
    taken = sys.stdlib_module_names | {"torch", "onnx", "tautomer"}
    for path in sources():
        assert path.stem not in taken or path.stem.startswith("__"), path


def test_tests_mirror_the_folders() -> None:
    """Every test file of a mirrored folder is named after a source file; every source file of passes/ has one."""
    for part in PARTS[1:]:
        for test in (ROOT / "tests" / part).rglob("test_*.py"):
            source = ROOT / test.relative_to(ROOT / "tests").with_name(test.name.removeprefix("test_"))
            private = source.with_name("_" + source.name)
            assert test.stem == "test_traps" or source.exists() or private.exists(), f"{test.relative_to(ROOT)} tests no file"
    for source in (ROOT / "passes").rglob("*.py"):
        if source.stem not in ("__init__", "recipes"):
            test = ROOT / "tests" / source.relative_to(ROOT).with_name("test_" + source.name)
            assert test.exists(), f"{source.relative_to(ROOT)} has no {test.relative_to(ROOT)}"
