"""What cannot matter to a command does not: a path with a space, a user without a name or home, the C locale, a notebook's
variables, a closed standard output."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SUBSET
from tests.other_data import write_patterns
from tests.server_process import free_port

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
# A process that knows nothing of its user; where that takes rights that this one lacks, it knows its name.
NAMELESS = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
HIDDEN = "mount --bind /dev/null /etc/passwd && "
BARE = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",  # as the locale is, without Python's own way around it
    "PYTHONUTF8": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_NUM_THREADS": "1",
    "PIP_NO_INDEX": "1",
}
TINY = "--batch-size 64 --device cpu --threads 1 --steps 2"
DATA = "--data-dir 'the data'"
WIDTHS = "--generator-widths 8,8,8 --discriminator-widths 4,4,4"


def run_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    can_hide = subprocess.run([*NAMELESS, "sh", "-c", HIDDEN + "true"], capture_output=True, check=False).returncode == 0
    prefix = [*NAMELESS, "bash", "-c", HIDDEN + command] if can_hide else ["bash", "-c", command]
    ports = {"GRPC": str(free_port()), "HTTP": str(free_port())}
    return subprocess.run(
        prefix, cwd=folder, env=BARE | ports, capture_output=True, timeout=500, check=False,
        encoding="utf-8", errors="replace",
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in a path with a space, whose environment is this one's, its run, model and data set in the usual places."""
    folder = tmp_path_factory.mktemp("home") / "a check out"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # Nothing may be installed: the environment is that of the tests, and its stamps are newer than what they depend on.
    os.utime(folder / "pyproject.toml", (0, 0))
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", environment)
    for stamp in (".all", ".serve"):
        (environment / stamp).touch()
    (folder / "build").mkdir()
    (folder / "build" / "proto-tools").symlink_to(ROOT / "build" / "proto-tools")
    for name in ("triton-client", "deploy-tools", "integrations", "schemas"):
        (folder / "build" / name).mkdir(parents=True)
        (folder / "build" / name / ".ready").touch()
    shutil.copytree(SUBSET, folder / "the data")
    write_patterns(folder / "other data", 5, train=768, test=64)  # of these the judges learn enough
    flags = shlex.quote(f"{TINY} {DATA} --runs-dir 'all runs' {WIDTHS}")
    done = run_shell(f"make train PRESET=dcgan ARGS={flags} >&-", folder)
    assert done.returncode == 0, done.stderr
    [run] = (folder / "all runs" / "dcgan").iterdir()
    run.rename(folder / "all runs" / "dcgan" / "my run")
    judged = {"step": 2, "samples": 1, "model": {}, "real": {}}
    (folder / "all runs" / "dcgan" / "my run" / "quality.json").write_text(json.dumps(judged))
    return folder


RUN = "'all runs/dcgan/my run'"
COMMANDS = {
    "setup": "make setup",
    "setup-serve": "make setup-serve",
    "train": f"""make train PRESET=mlp ARGS="{TINY} {DATA} --runs-dir 'other runs'" """,
    "activations": f"make activations RUN={RUN}",
    "runs": """make runs ARGS="--runs-dir 'all runs'" """,
    "evaluate": f"""make evaluate RUN={RUN} ARGS="--runs-dir 'all runs' --data-dir 'other data'" """,
    "judge": ".venv/bin/python -m export judge --runs-dir 'all runs' --data-dir 'other data' --out 'a judge.onnx'",
    "compare": f'make compare RUNS="{RUN} {RUN}"',
    "report": f".venv/bin/python -m train report --run {RUN}",
    "gallery": f"make gallery RUN={RUN} ARGS=\"{DATA} --out 'all pictures'\"",
    "export": f"make export RUN={RUN} ARGS=\"--models-dir 'all models'\"",
    "verify": ".venv/bin/python -m export verify serve/bundled/mlp/1",
    "speedrun": f"""make speedrun ARGS="--epochs 1 --scored 128 {DATA} --out 'a speedrun' -- {TINY} {WIDTHS}" """,
    "bench-train": 'make bench-train ARGS="--seconds 0.01 --device cpu --threads 1"',
    "fuzz": 'make fuzz ARGS="--runs 5 idx"',
    "protos": "make protos",
    "protos-check": "make protos-check",
    "dataset": "for each in 'write --model cdcgan --count 20' join 'verify --sample 5';"
    " do .venv/bin/python -m serve.dataset $each --out 'a set' || exit; done;"
    f" .venv/bin/python -m train dcgan {TINY} {WIDTHS} --data-dir 'a set/MNIST/raw' --runs-dir 'other runs'",
    "tokens": ".venv/bin/python -m serve.access.tokens add 'some tokens.json' --name batch-jobs",
    "batch-size": ".venv/bin/python -m export batch-size serve/bundled/mlp/1",
    "admin": "cp -r serve/bundled 'two versions' &&"
    ' .venv/bin/python -c \'from tests.bundle_copies import *; add_version(Path("two versions"), "mlp", 2)\' &&'
    " for each in 'load mlp --version 2 --versions 1' 'canary mlp --version 2 --share 0.05' 'set-default mlp --version 2'"
    " 'unload mlp --version 1' 'rollback mlp' show;"
    " do .venv/bin/python -m serve.admin $each --models-dir 'two versions' || exit; done",
    # A server, and who asks it: GRPC and HTTP are free ports.
    "serve and generate": """make serve ARGS="--grpc-port $GRPC --http-port $HTTP" & server=$!
        for i in $(seq 60); do
            make generate TARGET=127.0.0.1:$GRPC ARGS="--count 2 --seed 7 --out 'two digits.png'" 2>/dev/null && break; sleep 0.5
        done
        test -s 'two digits.png' && .venv/bin/python -m serve.client --target 127.0.0.1:$GRPC --again 'two digits.png' &&
        .venv/bin/python -m serve.admin status --target 127.0.0.1:$GRPC &&
        .venv/bin/python -m export watch --once --target 127.0.0.1:$GRPC --models-dir serve/bundled; status=$?
        kill $server; wait $server; exit $status""",
    "clean": "make -n clean",
    "train, finished": f"""make train PRESET=dcgan ARGS="--steps 3 --resume {RUN} {DATA}" """,
}
# What the others need is not here, or too much for a test; their recipes are read by the shell.
ONLY_READ = {
    "help": "it prints, and does nothing else",
    "test": "these are the tests", "test-all": "these are the tests", "mutate": "runs the tests", "page-test": "runs tests",
    "gpu-check": "needs a GPU", "image": "needs an engine for images", "sbom": "needs a package index",
    "lock": "needs a package index", "deploy-test": "needs the platform's tools", "cluster-test": "needs a cluster",
    "check": "takes minutes", "bench": "takes minutes", "bench-peers": "needs other servers",
    "bench-instructions": "needs valgrind",
}  # fmt: skip


# Commands of the guides that are measurements or tests.
MEASUREMENTS = {
    "tests.bench",
    "tests.bench.bounds",
    "tests.bench.hops",
    "tests.bench.memory",
    "tests.bench.training_set",
    "tests.bench.versus",
}
LEFT_OUT = MEASUREMENTS | {"tests.gpu.bundle", "tests.mutate", "pytest"}


def commands_of(text: str) -> set[str]:
    """The modules that are run by name in a text, each with its first word where it has several commands."""
    found = re.findall(r"\bpython -m ([a-z_.]+)(?: ([a-z][a-z-]*))?", text)
    several = ("serve.admin", "serve.dataset", "serve.access.tokens", "export", "train")
    return {f"{module} {word}".strip() if module in several else module for module, word in found}


def test_every_command_of_the_guides_is_tried() -> None:
    guides = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    named = set().union(*(commands_of(guide.read_text(encoding="utf-8")) for guide in guides))
    tried = set().union(*map(commands_of, COMMANDS.values()))
    # Where several commands are gone through in a loop, each is a word of the loop.
    words = re.findall(r"[a-z-]+", COMMANDS["admin"] + COMMANDS["dataset"])
    loops = {f"{module} {word}" for module in ("serve.admin", "serve.dataset") for word in words}
    by_make = {
        "serve",
        "export",
        "train",
        *(f"train {word}" for word in ("mlp", "dcgan", "cdcgan", "rpgan", "list", "compare", "evaluate")),
    }
    assert named - tried - loops - by_make - LEFT_OUT == set()


def test_every_target_is_tried_or_read() -> None:
    tried = {name for command in COMMANDS.values() for name in re.findall(r"make (?:-n )?([a-z-]+)", command)}
    assert tried | set(ONLY_READ) == TARGETS
    assert not tried & set(ONLY_READ)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_its_work_wherever_it_is(name: str, checkout: Path) -> None:
    done = run_shell(f"exec >&-; {COMMANDS[name]}", checkout)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", ONLY_READ)
def test_a_recipe_is_one_for_the_shell_wherever_it_is(name: str, checkout: Path) -> None:
    read = f"""make -n {name} RUN="a b's" TARGET="c d's" PYTHON="/no place/python" """
    done = run_shell(f"{read} > recipe && bash -n recipe", checkout)
    assert (done.returncode, done.stderr) == (0, "")
    recipe = (checkout / "recipe").read_text()
    assert "a b's" not in recipe, "it is quoted"
    assert "c d's" not in recipe
    assert recipe.count("/no place/python") == recipe.count('"/no place/python"')


@pytest.fixture(scope="module")
def train_command() -> Callable[..., list[str]]:
    """``python -m train mlp`` for two steps, into a folder."""

    def command(runs: str, *flags: str) -> list[str]:
        small = [*TINY.split(), f"--data-dir={SUBSET}", "--generator-widths=8", "--discriminator-widths=8"]
        return [sys.executable, "-m", "train", "mlp", *small, f"--runs-dir={runs}", *flags]

    return command


@pytest.mark.long
@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {}]
)
def test_a_run_in_a_path_that_is_no_text_ends_well(
    variables: dict[str, str], train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Issue: a run that had been finished ended with status 1."""
    runs = os.fsencode(tmp_path) + b"/Stra\xdfe"
    command = [os.fsencode(each) for each in train_command("")]
    command[-1] = b"--runs-dir=" + runs
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, timeout=200, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"finished: " + runs)
    assert len(list(Path(os.fsdecode(runs)).glob("mlp/*/report.html"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2> >(true)"])
def test_a_run_is_trained_whatever_its_streams(streams: str, train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Issue: a closed standard error trained nothing, and one that nobody reads ended the run."""
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(train_command(str(tmp_path)))} {streams}"],
        capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("mlp/*/result.json"))) == 1
