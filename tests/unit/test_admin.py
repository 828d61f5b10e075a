"""The local tool: what each action makes of serving.json, what it refuses, and that no change is lost or half-made."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from serve import admin, files
from serve.admin import HISTORY, as_table, main
from serve.manifest import BUNDLED_DIR
from serve.models.serving_file import parse_serving_state
from serve.pb.digits.v1 import digits_pb2 as pb
from tests.bundle_copies import add_version


@pytest.fixture
def models(bundles: Path) -> Path:
    """Versions 1 to 4 of the mlp."""
    for version in (2, 3, 4):
        add_version(bundles, "mlp", version)
    return bundles


def run(models: Path, *words: str) -> dict[str, Any]:
    """Make a change, and return what the file says of the mlp then."""
    assert main([*words, f"--models-dir={models}"]) == 0
    return wanted(models)


def wanted(models: Path) -> dict[str, Any]:
    content = (models / "serving.json").read_bytes()
    parse_serving_state(content, "here")
    state: dict[str, Any] = json.loads(content)["models"]["mlp"]
    return state


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command is refused in."""
    try:
        assert main(words) == 2
    except SystemExit as end:
        assert end.code == 2  # noqa: PT017  # as argparse refuses
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_each_action_makes_of_the_file_what_it_says(models: Path) -> None:
    assert run(models, "load", "mlp", "--version=2") == {"versions": [2, 4], "route": {"default": 4}}, "beside the latest"
    assert run(models, "load", "mlp", "--version=1")["versions"] == [1, 2, 4]
    first = {"default": 4}
    assert run(models, "set-default", "mlp", "--version=2")["route"] == {"default": 2}
    split = {"default": 2, "canary": 4, "canary_share": 0.05}
    assert run(models, "canary", "mlp", "--version=4", "--share=0.05")["route"] == split
    assert run(models, "set-default", "mlp", "--version=4") == {
        "versions": [1, 2, 4], "route": {"default": 4}, "previous": [first, {"default": 2}, split],
    }  # fmt: skip
    assert run(models, "unload", "mlp", "--version=1")["versions"] == [2, 4]
    assert run(models, "rollback", "mlp") == {"versions": [2, 4], "route": split, "previous": [first, {"default": 2}]}
    assert run(models, "rollback", "mlp")["route"] == {"default": 2}
    assert run(models, "rollback", "mlp") == {"versions": [2, 4], "route": first}
    assert run(models, "rollback", "mlp")["route"] == {"default": 3}, "without a route before it, the next lower version"
    assert "route" not in run(models, "set-default", "mlp")
    assert "versions" not in run(models, "load", "mlp")
    assert run(models, "unload", "mlp") == {"versions": []}
    assert run(models, "load", "mlp", "--version=3") == {"versions": [3]}
    assert run(models, "unload", "mlp", "--version=3") == {"versions": []}


def test_the_servers_versions_policy_counts_where_the_file_lists_none(models: Path) -> None:
    assert run(models, "load", "mlp", "--version=4", "--versions=latest:1,mlp=1+2") == {
        "versions": [1, 2, 4],
        "route": {"default": 2},
    }
    (models / "serving.json").write_text('{"models": {"mlp": {"versions": "latest:2", "route": {"default": 1}}}}')
    assert run(models, "unload", "mlp", "--version=4")["versions"] == [1, 3]


def test_other_models_and_unchanged_states_stay_as_they_are(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "serving.json"
    path.write_text('{"models": {"dcgan": {"versions": "latest:2"}, "mlp": {"versions": [1]}}}')
    before = path.read_bytes()
    assert main(["load", "mlp", "--version=1", f"--serving-file={path}"]) == 0
    assert json.loads(path.read_bytes())["models"]["dcgan"] == {"versions": "latest:2"}
    run(models, "load", "mlp", "--version=1")
    assert capsys.readouterr().out.endswith("serving.json is unchanged\n")
    assert before != path.read_bytes(), "the first pinned the default that was meant"


def test_a_diff_of_the_file_is_printed_and_show_prints_it_whole(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(models, "set-default", "mlp", "--version=2")
    capsys.readouterr()
    run(models, "set-default", "mlp", "--version=3")
    lines = capsys.readouterr().out.splitlines()
    assert f"--- {models / 'serving.json'}" in lines
    assert {line.strip("+- ") for line in lines if line[:1] in "+-" and '"default"' in line} == {'"default": 2', '"default": 3'}
    assert main(["show", f"--models-dir={models}"]) == 0
    assert capsys.readouterr().out == (models / "serving.json").read_text()
    assert main(["show", f"--serving-file={models / 'other.json'}"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == {}


def test_the_history_is_bounded(models: Path) -> None:
    for turn in range(2 * HISTORY):
        state = run(models, "set-default", "mlp", f"--version={1 + turn % 4}")
    assert len(state["previous"]) == HISTORY
    assert state["previous"][-1] == {"default": 3}
    for _ in range(HISTORY):
        state = run(models, "rollback", "mlp")
    assert "previous" not in state


def test_the_history_grows_by_what_changed_and_shrinks_by_what_was_taken_back(models: Path) -> None:
    """Beside a plain list: a change puts the route before it on top, once; a rollback takes the top, and leaves the rest."""
    random = Random(7)
    assert run(models, "load", "mlp", "--version=1")
    route, stack = {"default": 4}, []
    for _ in range(3 * HISTORY):
        version = random.randint(1, 4)
        action = random.choice(("set-default", "set-default", "canary", "rollback"))
        if action == "rollback" and stack:
            route = stack.pop()
            state = run(models, "rollback", "mlp")
        elif action == "canary" and version != route["default"]:
            split = {"default": route["default"], "canary": version, "canary_share": 0.25}
            state = run(models, "canary", "mlp", f"--version={version}", "--share=0.25")
            stack, route = (stack if split == route else [*stack, route][-HISTORY:]), split
        else:
            state = run(models, "set-default", "mlp", f"--version={version}")
            stack, route = (stack if route == {"default": version} else [*stack, route][-HISTORY:]), {"default": version}
        assert (state["route"], state.get("previous", [])) == (route, stack)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("set-default mlp --version 9", "has no version 9 of mlp: there are 1, 2, 3, 4"),
        ("load vae --version 1", "has no version 1 of vae: there is none"),
        ("load ../mlp --version 1", "'../mlp' is no model name"),
        (
            "canary mlp --version 2 --share 0.5",
            "a canary needs a default that is another version; set-default mlp --version N first",
        ),
        ("unload mlp --version 4", "version 4 of mlp answers requests that name none; set-default first"),
        ("unload mlp --version 2", "version 2 of mlp is not among those served: there are 3, 4"),
        ("rollback dcgan", "dcgan has no earlier default to go back to; choose one by set-default"),
        ("canary cdcgan --version 1 --share 0.5", "cdcgan is not served; load it first"),
        ("rollback cdcgan", "cdcgan is not served; load it first"),
        ("canary mlp --version 2", "the following arguments are required: --share"),
        ("canary mlp --version 2 --share 1", "--share: must be from"),
        ("canary mlp --version 0 --share 0.5", "--version: must be from 1"),
        ("set-default mlp --version -1", "--version: must be from 0"),
        ("load mlp --version 1 --versions newest", "--versions: 'newest' is no policy"),
        ("load mlp --version 4 --target localhost:50051", "servers take no changes any more: name the file, by --serving-file"),
        ("unload mlp --token-file token", "servers take no changes any more: name the file"),
        ("set-default mlp --version 1 --canary 2 --share 0.5", "use the action canary"),
        ("set-default mlp --version 1 --share 0.5", "use the action canary"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line_and_changes_nothing(
    words: str, message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / "serving.json"
    path.write_text('{"models": {"mlp": {"versions": "latest:2"}, "cdcgan": {"versions": []}}}')
    before = path.read_bytes()
    assert message in refused(capsys, *words.split(), f"--models-dir={models}")
    assert path.read_bytes() == before
    assert {entry.name for entry in models.iterdir() if entry.is_file()} == {"serving.json"}, "nothing is left beside it"


def test_without_the_folder_versions_are_not_checked_and_have_to_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "any.json"
    where = f"--serving-file={path}"
    assert "load needs --models-dir: the file does not list the versions of mlp" in refused(
        capsys, "load", "mlp", "--version=2", where
    )
    assert main(["set-default", "mlp", "--version=7", where]) == 0
    assert json.loads(path.read_bytes())["models"]["mlp"] == {"route": {"default": 7}}
    capsys.readouterr()
    assert "which file is not said; give --serving-file FILE" in refused(capsys, "unload", "mlp")


def test_the_bundled_models_are_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the bundled models are part of the program" in refused(capsys, "unload", "mlp", f"--models-dir={BUNDLED_DIR}")
    assert not (BUNDLED_DIR / "serving.json").exists()


def test_a_file_that_is_spoilt_or_cannot_be_read_or_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serving.json"
    path.write_text("{")
    assert f"{path}: Input data was truncated" in refused(capsys, "unload", "mlp", f"--serving-file={path}")
    assert path.read_text() == "{"
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be read (no regular file)" in refused(capsys, "show", f"--serving-file={path}")
    nowhere = tmp_path / "nowhere" / "serving.json"
    message = f"{nowhere} cannot be written (No such file or directory); change it where it comes from, or make room"
    assert message in refused(capsys, "unload", "mlp", f"--serving-file={nowhere}")
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    with files.locked(tmp_path):
        assert "another process has locked" in refused(capsys, "unload", "mlp", f"--serving-file={tmp_path / 'x.json'}")


def test_edits_at_the_same_time_are_all_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in two processes, and several in threads that read before the others write, if they may."""
    path = tmp_path / "serving.json"
    command = [sys.executable, "-m", "serve.admin", "unload"]
    both = [subprocess.Popen([*command, f"p{number}", f"--serving-file={path}"]) for number in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    honest = admin.replace_file

    def slowly(*given: Any) -> None:
        files.time.sleep(0.1)
        honest(*given)

    monkeypatch.setattr(admin, "replace_file", slowly)
    names = [f"t{number}" for number in range(4)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda name: main(["unload", name, f"--serving-file={path}"]), names)) == [0] * 4
    assert set(json.loads(path.read_bytes())["models"]) == {"p0", "p1", *names}
    assert [entry.name for entry in tmp_path.iterdir()] == ["serving.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    link = tmp_path / "serving.json"
    link.symlink_to(kept.name)
    assert main(["unload", "mlp", f"--serving-file={link}"]) == 0
    assert link.is_symlink()
    assert json.loads(kept.read_bytes())["models"] == {"mlp": {"versions": []}}


def test_the_table_tells_of_every_version_what_is_known() -> None:
    status = pb.VersionStatus(
        model="mlp", version=3, state=pb.VERSION_STATE_READY, digest="ab" * 32, traffic_share=0.95, calls=7, queued_images=12
    )
    failed = pb.VersionStatus(model="mlp", version=4, state=pb.VERSION_STATE_FAILED, reason="golden sample 2 is off")
    lines = as_table(pb.StatusResponse(versions=[status, failed])).splitlines()
    assert lines[1].split() == ["mlp", "3", "ready", "95.0%", "7", "12", "abababababab"]
    assert lines[2].split(maxsplit=6) == ["mlp", "4", "failed", "0.0%", "0", "0", "golden sample 2 is off"]


def test_flags_may_come_before_the_action(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--models-dir={models}", "--version", "2", "load", "mlp"]) == 0
    assert wanted(models)["versions"] == [2, 4]
    capsys.readouterr()
    for flags in (["--target", "127.0.0.1:1", "--timeout=0.5"], ["--timeout", "0.5", "--target=127.0.0.1:1"]):
        assert main([*flags, "status"]) == 1
        assert "127.0.0.1:1" in capsys.readouterr().err
    assert "servers take no changes" in refused(capsys, "--target", "127.0.0.1:1", "load", "mlp")
    assert "ACTION" in refused(capsys, "--target", "127.0.0.1:1")


def test_status_of_a_server_that_is_not_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--target=127.0.0.1:1", "--timeout=0.5"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n"), said.err[:20]) == ("", 1, "error: 127.0.0.1:1: ")
