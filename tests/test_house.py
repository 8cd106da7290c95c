"""The rules of the house that no tool of its own holds: imports, documentation, length, and what must not be called."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tersor

ROOT = Path(tersor.__file__).resolve().parent.parent
MODULES = sorted((ROOT / "tersor").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_FILE, MAX_FUNCTION = 400, 60
FORBIDDEN_CALLS = {"eval", "exec", "compile", "hasattr"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(path):
    return str(path.relative_to(ROOT))


def tree_of(path):
    return ast.parse(path.read_text(), name_of(path))


def report(found):
    assert not found, "\n" + "\n".join(found)


def test_each_package_imports_only_what_stands_below_it():
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("command", ["import tersor", "import tersor.cli.main"])
def test_importing_costs_no_torch(command):
    heavy = ["torch", "onnx", "onnxruntime", "matplotlib", "sklearn", "scipy"]
    code = f"import sys; {command}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_package_can_be_used_and_is_documented():
    assert list(tersor.__all__) == sorted(tersor.__all__) and tersor.__all__
    for name in tersor.__all__:
        assert (getattr(tersor, name).__doc__ or "").strip(), f"tersor.{name} has no docstring"
        assert name in dir(tersor)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tersor.nonsense


def public_definitions(tree):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def test_every_public_class_function_and_module_is_documented():
    found = []
    for path in MODULES:
        tree = tree_of(path)
        if tree.body and not ast.get_docstring(tree):
            found.append(f"{name_of(path)}: the module has no docstring")
        found += [
            f"{name_of(path)}:{node.lineno}: {node.name} has no docstring"
            for node in public_definitions(tree)
            if not ast.get_docstring(node)
        ]
    report(found)


def called(node):
    """The dotted name of what a call calls; it begins with a dot where that hangs on a value, as in f().eval()."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join([target.id if isinstance(target, ast.Name) else "", *reversed(parts)])


def offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called(node)
            if (
                name in FORBIDDEN_CALLS
                or name in {"torch.load", "torch.save", "yaml.load"}
                or name.endswith(".save_state")
            ):
                yield node.lineno, f"calls {name}"
        elif isinstance(node, ast.Import):
            yield from (
                (node.lineno, f"imports {a.name}") for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            yield node.lineno, f"imports {node.module}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "has a bare except"


def test_nothing_is_pickled_evaluated_or_caught_blindly():
    report([f"{name_of(path)}:{line}: {what}" for path in MODULES for line, what in offences(tree_of(path))])


@pytest.mark.parametrize(
    "code, what",
    [
        ("import torch\ntorch.load('x')", "calls torch.load"),
        ("import pickle", "imports pickle"),
        ("from joblib import dump", "imports joblib"),
        ("eval('1')", "calls eval"),
        ("try:\n    pass\nexcept:\n    pass", "has a bare except"),
        ("model.eval()", None),
        ("copy(model).eval()", None),
        ("accelerator.save_state('x')", "calls accelerator.save_state"),
    ],
)
def test_the_rule_above_sees_what_it_forbids(code, what):
    assert [said for _, said in offences(ast.parse(code))] == ([what] if what else [])


def length(node):
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return body[-1].end_lineno - body[0].lineno + 1 + (body[0].lineno - node.lineno if body is node.body else 0)


def test_files_and_functions_are_short():
    found = []
    for path in MODULES:
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE:
            found.append(f"{name_of(path)}: {lines} lines, at most {MAX_FILE}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and length(node) > MAX_FUNCTION:
                found.append(
                    f"{name_of(path)}:{node.lineno}: {node.name} has {length(node)} lines, at most {MAX_FUNCTION}"
                )
    report(found)


def test_no_file_is_named_after_nothing():
    nothing = re.compile(r"^(.*_)?(utils?|helpers?|common|misc|manager|handler|v2)(_.*)?$")
    report([name_of(path) for path in MODULES if nothing.match(path.stem)])


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+\s+(.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_in_the_documentation_resolve():
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            other = (page.parent / path).resolve() if path else page
            if not other.exists():
                found.append(f"{name_of(page)}: {target} is not there")
            elif anchor and other.suffix == ".md" and anchor not in anchors(other):
                found.append(f"{name_of(page)}: {target} names no heading")
    report(found)


def test_every_page_of_the_documentation_is_reached_from_its_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", index)}
    report(
        [
            name_of(page)
            for page in PAGES
            if page.parent.name == "docs" and page.name != "README.md" and page not in linked
        ]
    )


def test_the_code_in_the_documentation_names_only_what_the_package_has():
    """Every ``import tersor…``, ``from tersor… import …`` and ``tersor.x.y`` in a Python block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
            dotted = set(re.findall(r"\btersor(?:\.[A-Za-z_]\w*)+", block))
            for home, names in re.findall(r"^from (tersor[\w.]*) import ([\w, ]+)", block, re.M):
                dotted |= {f"{home}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
            found += [f"{name_of(page)}: {name}" for name in sorted(dotted) if not importable(name.split("."))]
    report(found)


def importable(parts):
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        try:
            for name in parts[cut:]:
                value = getattr(value, name)
        except AttributeError:
            return False
        return True
    return False


def test_the_pinned_versions_satisfy_what_the_package_asks_for():
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pinned[pin.name.lower().replace("_", "-")] = next(iter(pin.specifier)).version
    asked = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    for requirement in asked:
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"
    for requirement in asked[: len(project["dependencies"])]:
        assert any(part.operator == ">=" for part in requirement.specifier), f"{requirement} has no lower bound"
