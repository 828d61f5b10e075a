"""Administer a running server: which versions it serves, and which one answers requests that name none.

    python -m serve.admin status
    python -m serve.admin load mlp --version 4            # beside the others
    python -m serve.admin set-default mlp --version 3 --canary 4 --share 0.05
    python -m serve.admin set-default mlp --version 4
    python -m serve.admin rollback mlp
    python -m serve.admin unload mlp --version 3

If the server requires tokens, use one with the scope admin (``--token-file``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from google.protobuf.message import Message

from serve.client.channel import access_from, add_flags
from serve.client.diagnosis import described
from serve.command_line import INT63, TIMEOUT_S, OneLineParser, run_command
from serve.errors import SettingsError
from serve.pb.digits.v1 import control_pb2 as pb
from serve.pb.digits.v1 import control_pb2_grpc as pb_grpc

DEFAULT_TIMEOUT_S = 120.0  # loading a model on CUDA takes its time


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one change, or none, and print what is served. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        access, (method, request) = access_from(flags), _request(flags)
        with access.open_channel(flags.target, follow_health=False) as channel:
            call = getattr(pb_grpc.ModelControlStub(channel), method)
            response = call(request, timeout=flags.timeout, metadata=access.metadata)
    except grpc.RpcError as error:
        print(f"error: {flags.target}: {described(error, flags.target, access)}", file=sys.stderr)
        return 1
    except (SettingsError, ValueError) as error:  # protobuf refuses a name that is no text before anything is sent
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_table(response))
    return 0


def as_table(response: pb.ControlResponse) -> str:
    """The versions for a person."""
    lines = ["model         version  state     share  calls  queued  digest"]
    for status in response.versions:
        state = pb.VersionState.Name(status.state).removeprefix("VERSION_STATE_").lower()
        lines.append(
            f"{status.model:13s} {status.version:7d}  {state:8s} {status.traffic_share:6.1%} {status.calls:6d} "
            f"{status.queued_images:7d}  {status.digest[:12]}{status.reason and '  ' + status.reason}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _request(flags: argparse.Namespace) -> tuple[str, Message]:
    """The RPC's name and its message."""
    if flags.action == "status":
        return "Status", pb.StatusRequest(model=flags.model)
    if flags.action == "rollback":
        return "Rollback", pb.RollbackRequest(model=flags.model)
    if flags.action == "load":
        return "Load", pb.LoadRequest(model=flags.model, version=flags.version)
    if flags.action == "unload":
        return "Unload", pb.UnloadRequest(model=flags.model, version=flags.version)
    return "SetDefault", pb.SetDefaultRequest(
        model=flags.model, version=flags.version, canary_version=flags.canary, canary_share=flags.share
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.admin", description="Change what a running server serves.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "status": "list every version, on disk or served",
        "load": "load a version beside the others, or what the version policy picks",
        "unload": "stop serving a version, or the model",
        "set-default": "choose the version that answers requests without one, and its canary",
        "rollback": "undo the last change of default",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        add_flags(action)
        action.add_argument("--timeout", type=TIMEOUT_S, default=DEFAULT_TIMEOUT_S, help="deadline in seconds (default: 120)")
        action.add_argument("model", help="model name", default="", nargs="?" if name == "status" else None)
        if name in ("load", "unload", "set-default"):
            action.add_argument("--version", type=INT63, default=0, help="its version (default: 0, see control.proto)")
        if name == "set-default":
            action.add_argument("--canary", type=INT63, default=0, help="version that gets --share of the seeds")
            action.add_argument("--share", type=float, default=0.0, help="over 0 and under 1")
    return parser


if __name__ == "__main__":
    run_command(main)
