"""The house keeps its own rules: floors, sizes, commands with examples, documents that say what is true."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from dsec.client import EmbeddedTransport
from dsv4.cli.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [command.__name__ for command in COMMANDS]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs in the repository's root with this interpreter's own programs first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)


def tracked() -> list[Path]:
    return [ROOT / name for name in run("git", "ls-files", "-z").stdout.split("\0") if name and (ROOT / name).is_file()]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


def shell_lines() -> list[tuple[str, str]]:
    """(document, command) for every line of every shell block in the documents."""
    lines = []
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    lines.append((document.name, line.split("  #")[0].strip()))
    return lines


# Commands


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Example.*\n\s+dsv4 {name}\b", result.output), result.output


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "fastapi", "uvicorn", "matplotlib", "tokenizers", "safetensors")
    code = f"import sys, dsv4.cli.app; print([name for name in {heavy} if name in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "line",
    ["nosuch", "estimate --nosuch", "estimate --model nosuch", "inspect nosuch/folder", "doctor a b", "--nosuch"],
)
def test_a_users_mistake_is_one_line_and_code_2(line: str) -> None:
    result = run("dsv4", *line.split())
    assert result.returncode == 2, result
    assert result.stderr.startswith("dsv4: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("dsv4", "inspect", "nosuch/folder", DSV4_DEBUG="1").stderr


def test_doctor_reports_as_json_and_names_what_is_missing(tmp_path: Path) -> None:
    result = run("dsv4", "doctor", str(tmp_path), "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1 and not report["model"]["complete"]
    assert "config.json" in report["problems"][0]
    assert report["torch"]["version"].startswith("2.")
    assert report["memory_gib"]["total"] > 0 and report["cpu"]["cores"] > 0


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] in run("dsv4", "--version").stdout.split()


def test_installed_versions_are_the_pinned_ones() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if pin := line.split("#")[0].strip():
            required = Requirement(pin)
            if required.marker is None or required.marker.evaluate():
                found = version(required.name)
                assert found.split("+")[0] in required.specifier, f"{pin} is constraints.txt's, installed is {found}"


# Rooms


def test_floors_hold() -> None:
    result = run("lint-imports", "--no-cache")
    assert result.returncode == 0, result.stdout


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "dsv4").rglob("*.py")}
    assert len(lengths) > 40
    assert not {str(path): n for path, n in lengths.items() if n > 600}


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in (ROOT / "dsv4").rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text()))]


def test_tracked_files_name_no_persons_machine() -> None:
    homes = re.compile(rf"(?<![\w.])/(?:home|Users)/[a-z]\w+/|(?<![\w.])/root/\w|{re.escape(str(ROOT))}\b")
    inside = ROOT / "tests" / "dsec"  # where /root is a sandbox's
    for path in tracked():
        if path.is_relative_to(inside):
            continue
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            assert not (found := homes.search(data.decode("utf-8", "replace"))), f"{path}: {found}"


@pytest.mark.parametrize("script", ["script/setup", "script/server", "script/test", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0


# Documents


def test_shell_lines_of_the_documents_name_real_commands_and_options() -> None:
    """Every `dsv4 ...` line parses against the command's own options; every script and Python file exists."""
    lines = shell_lines()
    assert len(lines) > 10
    helps = {name: CliRunner().invoke(app, [name, "--help"]).output for name in NAMES}
    for document, line in lines:
        words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        where = f"{document}: {line}"
        if words[0].endswith("dsv4"):
            assert words[1] in (*NAMES, "--help", "--version"), where
            for word in words[2:]:
                if word.startswith("--"):
                    assert word.split("=")[0] in helps[words[1]], where
        elif words[0].startswith("script/"):
            assert os.access(ROOT / words[0], os.X_OK), where
        elif words[0].endswith("python"):
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), where
        elif words[0] not in ("curl", "git", "cd"):
            assert (Path(sys.executable).parent / words[0].removeprefix(".venv/bin/")).exists(), where


def test_quick_lines_of_the_readme_run() -> None:
    lines = [line for name, line in shell_lines() if name == "README.md"]
    quick = [line for line in lines if re.match(r"dsv4 (estimate|inspect|doctor|--)", line)]
    assert quick
    for line in quick:
        result = run("bash", "-c", line)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"


def test_python_blocks_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    with tempfile.TemporaryDirectory(prefix="dsec") as home:  # of their own: the machine's may hold the same trajectory
        monkeypatch.setenv("DSEC_HOME", home)
        for snippet in snippets:
            result = run(sys.executable, "-c", snippet)
            assert result.returncode == 0, f"{snippet}\n{result.stderr}"
        asyncio.run(end_edge(Path(home)))


async def end_edge(home: Path) -> None:
    transport = EmbeddedTransport(home)
    await transport.call("shutdown", {"destroy": True})
    await transport.close()


def test_links_and_trees_of_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img src=\"([^\"]+)\"", text):
            name = "".join(target)
            assert name.startswith("http") or (document.parent / name).exists(), f"{document.name}: {name}"
        for name in re.findall(r"`((?:dsv4|tests|benchmarks|recipes|script|docs|models)/[\w./-]*)", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_the_readme_counts_the_mutants() -> None:
    from tests.parity import test_mtp, test_mutations

    count = len(test_mutations.MUTANTS) + len(test_mtp.MUTANTS)
    assert f"{count} mutants" in (ROOT / "README.md").read_text()


def definitions(path: Path) -> set[Any]:
    """Functions, classes, methods (as Class.method), constants and the literal keys of tables in a file."""
    names: set[Any] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{n.name}" for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)}
        for target in [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", []):
            names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            names |= {n.value for n in ast.walk(target) if isinstance(n, ast.Constant)}
        if isinstance(value := getattr(node, "value", None), ast.Dict):
            names |= {key.value for key in value.keys if isinstance(key, ast.Constant)}
    return names


def test_the_report_map_names_functions_and_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "report_map.md").read_text().splitlines() if line.startswith("| ")]
    pairs = [pair for row in rows for pair in re.findall(r"`([\w/]+\.py)::([\w.]+)`", row)]
    assert len(pairs) > 120
    for file, name in pairs:
        assert (ROOT / file).is_file(), file
        assert name in definitions(ROOT / file), f"{file} has no {name}"
    for row in rows[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert "::" in cells[-2] and "tests/" in cells[-1], f"a row without function or test: {row}"
