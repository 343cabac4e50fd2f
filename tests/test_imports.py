"""Who may import whom: the rules of docs/design.md, kept by reading the import statements; and what imports late."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fedtrio

ROOT = Path(fedtrio.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}

# What of ours each may import, besides its own folder. All else (config, run, compare, cli, …) stands above these.
MAY = {
    "errors": set(),
    "hub": set(),
    "names": set(),
    "extend": {"errors", "codecs", "data", "frameworks"},
    "ledger": set(),
    "meter": set(),
    "message": {"errors"},
    "codecs": {"errors", "message"},
    "checkpoint": {"errors"},
    "coding": {"errors", "message", "codecs"},
    "program": {"errors", "message", "codecs", "coding", "ledger", "meter", "checkpoint"},
    "wires": {"errors"},
    "models": {"errors", "hub"},
    "data": {"errors", "hub", "names"},
    "aggregation": {"errors"},
    "frameworks": {"errors", "message", "codecs", "models", "data", "aggregation"},
    "evaluate": {"errors", "data", "models"},
    "result": {"evaluate", "frameworks", "ledger", "models"},
    "report": {"errors"},
}
FAMILIES = ("frameworks/fedllm", "frameworks/kd", "frameworks/split")  # a framework of several files
NOT_AT_SITES = {"cli", "run", "compare", "serve", "remote", "config", "config_file", "report"}


def imports_of(path: Path, name: str, top_level: bool = False) -> set[str]:
    """Modules of ours that a file names, as `models/cut`; with `top_level` also others', as far as run on import."""
    package = ["fedtrio", *name.split("/")[:-1]]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _run_on_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    ours = {"/".join(m.split(".")[1:]) for m in found if m.startswith("fedtrio.")}
    ours = {_file(m) for m in ours} | {"__init__" for m in found if m == "fedtrio"}
    return ours if not top_level else {m.split(".")[0] for m in found}


def _file(module: str) -> str:
    """Of `message/Message` it is `message`, of `wires` it is `wires/__init__`."""
    if module in FILES:
        return module
    return f"{module}/__init__" if f"{module}/__init__" in FILES else _file(module.rpartition("/")[0] or "__init__")


def _run_on_import(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _run_on_import(node)


def part(name: str) -> str:
    return name.split("/")[0]


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    """So that an empty finding means that there is nothing."""
    for statement in ("from ..wires import loopback", "from ..wires.loopback import Loopback", "import fedtrio.wires"):
        (tmp_path / "x.py").write_text(f"def late():\n    {statement}\n")
        assert {part(m) for m in imports_of(tmp_path / "x.py", "frameworks/x")} == {"wires"}
    assert {"message", "models/train", "aggregation/holders", "frameworks/split_check"} <= imports_of(
        FILES["frameworks/split"], "frameworks/split"
    )
    assert "frameworks" in {part(m) for m in imports_of(FILES["config"], "config")}
    assert {"errors", "models/cut"} <= imports_of(FILES["models/adapter"], "models/adapter")
    assert "torch" in imports_of(FILES["message"], "message", top_level=True)


@pytest.mark.parametrize("name", [name for name in FILES if part(name) in MAY])
def test_who_may_import_whom(name: str) -> None:
    wrong = {m for m in imports_of(FILES[name], name) if part(m) not in MAY[part(name)] | {part(name)}}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_frameworks_know_no_wire() -> None:
    for name in FILES:
        if part(name) in ("frameworks", "models", "data", "aggregation", "message"):
            parts = {part(m) for m in imports_of(FILES[name], name)}
            assert not parts & {"wires", "program", "ledger", "meter", *NOT_AT_SITES}, name


def test_frameworks_import_only_the_lab_and_fedllm_of_each_other() -> None:
    for name in FILES:
        if part(name) == "frameworks" and name not in ("frameworks/__init__", "frameworks/lab"):
            siblings = {m for m in imports_of(FILES[name], name) if part(m) == "frameworks"}
            family = {m for m in siblings if any(name.startswith(f) and m.startswith(f) for f in FAMILIES)}
            assert siblings - family <= {"frameworks/lab", "frameworks/guards", "frameworks/fedllm"}, name


def test_wires_know_no_message() -> None:
    for name in FILES:
        if part(name) == "wires":
            outside = imports_of(FILES[name], name, top_level=True)
            assert not outside & {"torch", "safetensors", "numpy", "transformers"}, name


def test_nothing_imports_what_stands_above() -> None:
    """The command line is imported by nothing, and the run only by those above it."""
    users = {target: {n for n in FILES if target in imports_of(FILES[n], n)} for target in ("cli", "compare", "run")}
    assert users["cli"] <= {"__main__"}
    above = {"workers", "trackers", "compare", "serve", "sweep", "plan", "cli", "__init__"}
    assert {part(n) for n in users["run"]} <= above


def test_there_is_no_circle() -> None:
    """Among statements run on import."""
    graph = {name: {m for m in imports_of(path, name) if m != name} for name, path in FILES.items()}
    graph["__init__"] = set()  # imports late
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for inner in graph.get(name, ()):
                walk(inner, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def modules_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "safetensors"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compare", "--help"], ["plan", "--help"], ["advise", "--help"]]
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    start = f"sys.argv = ['fedtrio', *{arguments}]\nfrom fedtrio.cli import main"
    code = f"{start}\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    loaded = modules_after(code)
    assert "fedtrio.cli" in loaded and not loaded & HEAVY


def test_the_package_and_the_report_import_no_torch() -> None:
    names = [n.replace("/", ".") for n in FILES if part(n) == "report" and "__init__" not in n]
    loaded = modules_after("\n".join(["import fedtrio", *(f"import fedtrio.{name}" for name in names)]))
    assert "fedtrio.report.page" in loaded and not loaded & HEAVY


def test_peft_and_transformers_are_imported_late() -> None:
    """Importing them takes seconds, and only loading a model needs them."""
    loaded = modules_after("import fedtrio.run")
    assert "torch" in loaded and not loaded & {"peft", "transformers"}
