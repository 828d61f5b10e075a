"""Edit the file that says which versions are served, and which one answers requests that name none: ``serving.json``.

    python -m serve.admin show --models-dir models
    python -m serve.admin load mlp --version 4 --models-dir models              # beside those that are served
    python -m serve.admin set-default mlp --version 3 --models-dir models
    python -m serve.admin canary mlp --version 4 --share 0.05 --models-dir models
    python -m serve.admin rollback mlp --models-dir models                      # to the route before
    python -m serve.admin unload mlp --version 3 --models-dir models
    python -m serve.admin status --target localhost:50051                       # what a server makes of it

The file is changed whole, under a lock, and the change is printed as a diff. Servers follow it at their next poll. With
``--models-dir`` the versions that are named must be there. Only ``status`` calls a server.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
from msgspec.structs import replace

from serve.client.channel import access_from, add_flags
from serve.client.diagnosis import failure_of
from serve.client.errors import DigitError
from serve.command_line import INT63, TIMEOUT_S, OneLineParser, failed, run_command, within
from serve.errors import BundleError, SettingsError
from serve.files import locked, replace_file
from serve.manifest import BUNDLED_DIR, NAME_PATTERN
from serve.models.repository import Repository
from serve.models.serving_file import (
    FILE_NAME,
    ModelState,
    Route,
    ServingState,
    parse_policies,
    parse_serving_state,
    pick,
    watched_serving_file,
)
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc

HISTORY = 16  # routes of a model that a rollback can go back through
# Of the time when servers took changes from callers.
RETIRED = {
    **dict.fromkeys(
        ("--target", "--ca", "--cert", "--key", "--token-file", "--timeout"),
        "servers take no changes any more: name the file, by --serving-file or --models-dir",
    ),
    "--canary": "use the action canary",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one action. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(_action_first(sys.argv[1:] if arguments is None else arguments))
    if flags.action == "status":
        return _status(flags)
    path: Path | None = flags.serving_file or (flags.models_dir and flags.models_dir / FILE_NAME)
    try:
        if path is None:
            raise SettingsError("which file is not said; give --serving-file FILE, or --models-dir DIR for the one in it")
        path = path.resolve()
        if flags.action == "show":
            print(_text(watched_serving_file(path).value), end="")
            return 0
        if path.parent == BUNDLED_DIR.resolve():
            raise SettingsError("the bundled models are part of the program; name another folder, or --serving-file")
        with locked(path.parent):
            before = watched_serving_file(path).value
            after = ServingState(models={**before.models, flags.model: _Change(before, flags).state()})
            content = _text(after)
            parse_serving_state(content.encode(), str(path))
            if after != before:
                replace_file(path, content.encode(), 0o644)
    except (SettingsError, BundleError) as error:
        return failed(error)
    except OSError as error:
        way_out = "change it where it comes from, or make room"
        return failed(f"{path} cannot be written ({error.strerror}); {way_out}")
    old, new = _text(before).splitlines(), content.splitlines()
    print("\n".join(difflib.unified_diff(old, new, str(path), str(path), lineterm="")) or f"{path} is unchanged")
    return 0


def _action_first(arguments: Sequence[str]) -> list[str]:
    """Flags before the action, each with its one value, moved behind it: argparse would take them for the actions' parent's."""
    flags, rest = [], list(arguments)
    while rest and rest[0].startswith("--") and rest[0] != "--help":
        taken = 1 if "=" in rest[0] else 2
        flags += rest[:taken]
        rest = rest[taken:]
    return rest[:1] + flags + rest[1:]


class _Change:
    """What one action makes of a model's state. Raises SettingsError when it cannot be made."""

    def __init__(self, before: ServingState, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._name: str = flags.model
        if not NAME_PATTERN.fullmatch(self._name):
            raise SettingsError(f"{self._name[:64]!a} is no model name: lower-case letters, digits, - and _, at most 63")
        self._state = before.of(self._name)
        self._there: list[int] | None = None  # not known without the folder
        if flags.models_dir is not None:
            self._there = sorted(Repository(flags.models_dir).scan().get(self._name, ()))

    def state(self) -> ModelState:
        actions: dict[str, Callable[[int], ModelState]] = {
            "load": self._load,
            "unload": self._unload,
            "set-default": self._set_default,
            "canary": self._canary,
            "rollback": self._rollback,
        }
        return actions[self._flags.action](getattr(self._flags, "version", 0))

    def _load(self, version: int) -> ModelState:
        if not version:
            return replace(self._state, versions=None)
        versions = self._versions("load")
        route = self._state.route or (Route(versions[-1]) if versions else None)  # the new one is beside, not instead
        return replace(self._state, versions=tuple(sorted({*versions, self._checked(version)})), route=route)

    def _unload(self, version: int) -> ModelState:
        if not version:
            return ModelState(versions=())
        versions = self._versions("unload")
        route = self._state.route or Route(versions[-1] if versions else version)
        left = tuple(number for number in versions if number != version)
        if len(left) == len(versions):
            raise SettingsError(f"version {version} of {self._name} is not among those served: {_listed(versions)}")
        if not left:
            return ModelState(versions=())
        if route.share(version):
            raise SettingsError(f"version {version} of {self._name} answers requests that name none; set-default first")
        return replace(self._state, versions=left)

    def _set_default(self, version: int) -> ModelState:
        self._check_served()
        return self._routed(Route(self._checked(version)) if version else None)

    def _canary(self, version: int) -> ModelState:
        self._check_served()
        default = self._state.route.default if self._state.route else 0
        if default in (0, version):
            raise SettingsError(f"a canary needs a default that is another version; set-default {self._name} --version N first")
        return self._routed(Route(default, self._checked(version), self._flags.share))

    def _rollback(self, _: int) -> ModelState:
        self._check_served()
        *earlier, route = self._state.previous or (None,)
        if route is None and self._there is not None:
            default = self._state.route.default if self._state.route else max(self._versions("rollback"), default=0)
            lower = [number for number in self._there if number < default]
            route = Route(lower[-1]) if lower else None
        if route is None:
            raise SettingsError(f"{self._name} has no earlier default to go back to; choose one by set-default")
        for version in sorted(route.versions):
            self._checked(version)
        return replace(self._state, route=route, previous=tuple(earlier))

    def _routed(self, route: Route | None) -> ModelState:
        current = self._state.route
        if current is None and self._there is not None and (versions := self._versions("route")):
            current = Route(versions[-1])
        previous = self._state.previous if current in (None, route) else (*self._state.previous, current)[-HISTORY:]
        return replace(self._state, route=route, previous=previous)

    def _versions(self, action: str) -> list[int]:
        """The versions that are served, lowest first, as far as the file and the folder tell."""
        routed = self._state.route.versions if self._state.route else set()
        if isinstance(self._state.versions, tuple):
            return sorted({*self._state.versions, *routed})
        if self._there is None:
            raise SettingsError(f"{action} needs --models-dir: the file does not list the versions of {self._name}")
        policies = parse_policies(self._flags.versions)
        return sorted(
            {*pick(self._state.policy(policies.get(self._name, policies[""])), self._there), *routed & set(self._there)}
        )

    def _checked(self, version: int) -> int:
        if self._there is not None and version not in self._there:
            raise SettingsError(f"{self._flags.models_dir} has no version {version} of {self._name}: {_listed(self._there)}")
        return version

    def _check_served(self) -> None:
        if self._state.versions == ():
            raise SettingsError(f"{self._name} is not served; load it first")


def _listed(versions: Sequence[int]) -> str:
    return f"there are {', '.join(map(str, versions))}" if versions else "there is none"


def _text(state: ServingState) -> str:
    return msgspec.json.format(msgspec.json.encode(state), indent=2).decode() + "\n"


def _status(flags: argparse.Namespace) -> int:
    """Print what a server says of its versions. Returns the exit status."""
    try:
        access, request = access_from(flags), pb.StatusRequest(model=flags.model)
        opened = access.open_channel(flags.target, follow_health=False)
    except DigitError as error:
        return failed(error.details())
    except ValueError as error:  # protobuf refuses a name that is no text before anything is sent
        return failed(error)
    try:
        with opened as channel:
            stub = pb_grpc.DigitGeneratorStub(channel)
            print(as_table(stub.Status(request, timeout=flags.timeout, metadata=access.metadata)))
    except grpc.RpcError as error:
        return failed(f"{flags.target}: {failure_of(error, flags.target, access, flags.timeout)}", 1)
    return 0


def as_table(response: pb.StatusResponse) -> str:
    """The versions as a text table."""
    lines = ["model         version  state     share  calls  queued  digest"]
    for status in response.versions:
        state = pb.VersionState.Name(status.state).removeprefix("VERSION_STATE_").lower()
        lines.append(
            f"{status.model:13s} {status.version:7d}  {state:8s} {status.traffic_share:6.1%} {status.calls:6d} "
            f"{status.queued_images:7d}  {status.digest[:12]}{status.reason and '  ' + status.reason}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.admin", description="Edit the file that says what servers serve.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="list the versions of a running server, on disk or served")
    add_flags(status)
    status.add_argument("--timeout", type=TIMEOUT_S, default=30.0, help="deadline in seconds (default: 30)")
    status.add_argument("model", help="model name (default: all)", default="", nargs="?")
    texts = {
        "show": "print the file",
        "load": "serve one more version; without --version, serve those that the server's --versions selects",
        "unload": "stop serving a version; without --version, stop serving the model",
        "set-default": "choose the version that answers requests without a version; without --version, the highest one",
        "canary": "let another version answer a share of the requests without a version",
        "rollback": "undo the last change by set-default or canary",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--serving-file", type=Path, metavar="FILE", help="the file (default: serving.json in --models-dir)")
        action.add_argument("--models-dir", type=Path, metavar="DIR", help="folder of the models, to check versions against")
        for flag, instead in RETIRED.items():
            action.add_argument(flag, type=_refused(instead), help=argparse.SUPPRESS)
        if name == "show":
            continue
        action.add_argument("model", help="model name")
        action.add_argument(
            "--versions",
            default="latest",
            help="the server's own --versions, for a model whose versions are not in the file (default: latest)",
        )
        if name in ("load", "unload", "set-default", "canary"):
            low = within(1, (1 << 63) - 1) if name == "canary" else INT63
            action.add_argument("--version", type=low, default=0, required=name == "canary", help="its version")
        if name == "canary":
            action.add_argument(
                "--share", type=within(1e-6, 1 - 1e-6), required=True, help="share of the seeds, more than 0 and less than 1"
            )
        elif name == "set-default":
            action.add_argument("--share", type=_refused("use the action canary"), help=argparse.SUPPRESS)
    return parser


def _refused(instead: str) -> Callable[[str], Any]:
    def refuse(_: str) -> Any:
        raise argparse.ArgumentTypeError(instead)

    return refuse


if __name__ == "__main__":
    run_command(main)
