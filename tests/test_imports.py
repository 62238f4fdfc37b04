"""Who may import whom, what must stay lazy, and what is banned."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline import cli

PACKAGES = ("pipeline", "data", "reward", "stages")
DRIVER = {
    "plan",
    "checks",
    "runner",
    "launch",
    "report",
    "cli",
    "inspection",
    "progress",
    "diagnostics",
    "interruption",
    "resumption",
    "cost",
    "forecast",
    "garbage",
    "inputs",
    "doctor",
    "tokens",
    "origins",
    "chat",
    "screens",
    "export",
    "card",
    "tracking",
    "difference",
    "observations",
    "harness",
}
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "matplotlib", "huggingface_hub"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
BANNED_CALLS = {
    "yaml.load",
    "eval",
    "exec",
    "os.system",
    "compile",
    "marshal.loads",
    "np.load",
    "numpy.load",
    "os.popen",
    "pandas.read_pickle",
    "pd.read_pickle",
    "torch.hub.load",
    "torch.load",
    "torch.save",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
}
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
LAYERS = ["kernel", "data", "reward", "stages/core", "stages", "driver"]


def layer(module: str) -> str | None:
    """The layer of a dotted module name; None for other packages."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] == "pipeline":
        return "driver" if len(parts) > 1 and parts[1] in DRIVER else "kernel"
    return "stages/core" if parts[:2] == ["stages", "core"] else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    """Names of what is imported, except under `if __name__ == "__main__":` and, if asked, in functions."""
    for node in ast.iter_child_nodes(tree):
        is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        if is_main or (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, top_level=top_level)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_imports_what_stands_above_it(path: Path) -> None:
    own = layer(dotted(path))
    assert own is not None
    for name in imports(ast.parse(path.read_text())):
        other = layer(name)
        lazily_by_the_driver = own == "driver" and other == "data"
        if other is not None and not lazily_by_the_driver:
            assert LAYERS.index(other) <= LAYERS.index(own), f"{dotted(path)} ({own}) imports {name} ({other})"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipeline").rglob("*.py")), ids=dotted)
def test_the_pipeline_imports_nothing_heavy_at_the_top(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level=True)}
    draws = {"matplotlib"} if "report" in path.parts else set()  # the report is itself imported when it is written
    assert not found & (HEAVY - draws)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_runs_code_that_it_read(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(tree)} & PICKLES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        assert name not in BANNED_CALLS
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert "shell" not in given
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("allow_pickle", "False") == "False"
        assert "weights_only" not in given


READS_MODELS = {
    "data.gguf",
    "data.tokenizer",
    "pipeline.origins",
    "stages.core.export",
    "stages.core.models",
    "stages.core.roles",
    "stages.core.trl.models",
}
"""Modules that let a library read a directory of a model's, which `pipeline.inputs` has checked before or, in exports,
Baton has just written."""
NAMED_BY_TABLES = {"pipeline.runner", "stages.core.trl.arguments"}
"""Modules that import a module of a name which comes from a table of Baton's own, never from a file."""


def test_models_are_read_and_modules_imported_by_name_in_few_places() -> None:
    reading, importing = set(), set()
    for path in MODULES:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            if name == "from_pretrained":
                reading.add(dotted(path))
            if name in ("import_module", "__import__"):
                importing.add(dotted(path))
    assert reading == READS_MODELS
    assert importing == NAMED_BY_TABLES | {"data.adapters"}


PROBE = """
import json, sys
sys.path.insert(0, {tests!r})
import fakes
fakes.install(sys.modules)
from pipeline import cli
for arguments in json.loads(sys.argv[1]):
    code = cli.execute(cli.app, arguments)
    heavy = sorted(set(sys.modules) & {heavy!r})
    sys.stderr.write(json.dumps([arguments, code, heavy]) + "\\n")
"""


def heavy_after(commands: Sequence[Sequence[str | Path]]) -> list[list[str]]:
    """What is loaded after each of these commands, which a new process runs one after the other."""
    probe = PROBE.format(tests=str(REPOSITORY / "tests"), heavy=HEAVY)
    spelled = [list(map(str, command)) for command in commands]
    command = [sys.executable, "-c", probe, json.dumps(spelled)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in done.stderr.splitlines()[-len(spelled) :]]
    assert [(arguments, code) for arguments, code, _ in told] == [(each, 0) for each in spelled], done.stderr
    return [heavy for _, _, heavy in told]


@pytest.mark.slow
def test_pretraining_waits_for_no_library_of_adapters() -> None:
    script = """
import sys
import stages.tokenizer, stages.pretrain
print(sorted({"peft", "bitsandbytes", "trl", "datasets", "matplotlib"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_running_loads_what_draws_the_report_beside_what_stages_load(config: Path) -> None:
    assert heavy_after([("run", config)]) == [["matplotlib"]]


def test_looking_at_a_run_loads_no_library_that_trains(config: Path, fake_stages: None) -> None:
    run = config.parent / "run"
    assert cli.execute(cli.app, ["run", str(config)]) == 0
    commands: list[tuple[str | Path, ...]] = [
        ("--help",),
        ("schema",),
        ("plan", config),
        ("run", config),
        ("verify", run),
        ("verify", run, "--fast"),
        ("gc", run),
        ("status", run),
        ("why", run, "dpo"),
        ("diff", run, run),
        ("show", run / "stages" / "dpo"),
    ]
    assert heavy_after(commands) == [[]] * len(commands)
