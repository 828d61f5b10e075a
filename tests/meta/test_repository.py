"""What holds the repository together: generated code is fresh; files, commands and links that the docs name are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md")
DOCS = {name: (ROOT / name).read_text() for name in PAGES} | GUIDES
LAYOUT = GUIDES["docs/layout.md"]
MAKEFILE = (ROOT / "Makefile").read_text()
PROTO_TOOLS = ROOT / "build" / "proto-tools" / "bin"
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_generated_code_is_what_the_protos_give(tmp_path: Path) -> None:
    protos = sorted(path.relative_to(ROOT / "protos") for path in (ROOT / "protos").rglob("*.proto"))
    assert protos
    command = [
        PROTO_TOOLS / "python", "-m", "grpc_tools.protoc", f"-Iserve/pb={ROOT / 'protos'}", f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", *(f"serve/pb/{proto}" for proto in protos),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert len(made) == 3 * len(protos)
    for path in made:
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is stale: run make protos"
    kept = {path.relative_to(ROOT) for path in (ROOT / "serve" / "pb").rglob("*_pb2*") if "__pycache__" not in path.parts}
    assert kept == set(made), "serve/pb holds code that no proto gives"


def test_the_tree_in_the_docs_is_the_tree() -> None:
    block = re.search(r"```tree\n(.*?)```", LAYOUT, re.DOTALL)
    assert block
    told, parents = set(), [""]
    for line in block[1].splitlines():
        match = re.match(r"( *)(\S+)", line)
        assert match, line
        depth = len(match[1]) // 2
        name = match[2]
        parents[depth + 1 :] = [parents[depth] + name]
        told.add((parents[depth] + name).rstrip("/"))
    there = set()
    for name in tracked():
        parts = Path(name).parts
        there |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    assert told <= there, f"docs/layout.md names what is not there: {sorted(told - there)}"
    unlisted = ("serve/bundled/", "serve/pb/", "serve/observability/", "serve/client/", "serve/api/page/")
    rooms = {
        name
        for name in there
        if name.count("/") == 0
        or (name.startswith(("train/", "export/", "serve/")) and name.count("/") == 1)
        or (name.startswith("serve/") and name.count("/") == 2 and not name.startswith(unlisted))
    }
    untold = {name for name in rooms - told if not name.endswith("__init__.py") and not name.endswith("__main__.py")}
    assert not untold, f"docs/layout.md does not name {sorted(untold)}"


def test_every_make_target_in_the_docs_is_in_the_makefile_and_explained() -> None:
    named = {target for text in DOCS.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert len(named) > 8
    assert named <= TARGETS, f"the docs name targets that are not there: {sorted(named - TARGETS)}"


def test_every_link_in_the_docs_leads_somewhere_and_every_guide_is_linked() -> None:
    linked = set()
    for name, text in DOCS.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                path = (ROOT / name).parent / target
                assert path.exists(), f"{name} links to {target}"
                linked.add(path.resolve().relative_to(ROOT).as_posix())
    missing = set(DOCS) - linked - {"README.md"}
    assert not missing, f"nothing links to {sorted(missing)}"


def test_rooms_hold_at_most_a_dozen_files() -> None:
    files: dict[str, int] = {}
    for name in tracked():
        if name.startswith(("train/", "export/", "serve/")) and name.endswith(".py") and not name.endswith("__init__.py"):
            folder = name.rpartition("/")[0]
            files[folder] = files.get(folder, 0) + 1
    crowded = {folder: count for folder, count in files.items() if count > 12}
    assert not crowded


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == TARGETS
    assert len(listed.splitlines()) == len(TARGETS)


@pytest.mark.parametrize("pattern", [r"(^|/)(utils|common|helpers|manager|misc)\.py$"])
def test_no_file_has_a_name_that_says_nothing(pattern: str) -> None:
    assert not [name for name in tracked() if re.search(pattern, name)]


def test_init_files_hold_a_docstring_only() -> None:
    for name in tracked():
        # The client is imported by users, as a package: its names are re-exported.
        if name.endswith("__init__.py") and name != "serve/client/__init__.py":
            lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
            assert len(lines) == 1, name
            assert lines[0].startswith('"""'), name


def test_tracked_files_are_small_and_the_tests_data_smaller() -> None:
    for name in tracked():
        assert (ROOT / name).stat().st_size <= 12 << 20, name
    assert sum((ROOT / name).stat().st_size for name in tracked() if name.startswith("tests/data/")) <= 300_000
