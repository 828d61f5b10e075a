"""``digits.v1.ModelControl`` and the Open Inference Protocol's repository extension: two protocols for one administration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serve.api.admission import Admission, Call
from serve.api.rpc import RpcTable
from serve.errors import RequestError
from serve.models.administration import Administration
from serve.models.reconcile import VersionStatus
from serve.models.serving_file import Route
from serve.pb.digits.v1 import control_pb2 as pb
from serve.pb.inference import open_inference_pb2 as oip

log = logging.getLogger(__name__)

SERVICE = "digits.v1.ModelControl"
OPEN_INFERENCE = "inference.GRPCInferenceService"
OPEN_INFERENCE_STATES = {"READY": "READY", "LOADING": "LOADING", "DRAINING": "UNLOADING"}  # all else: UNAVAILABLE


class ModelControlService:
    """The handlers of both. They raise RequestError, and LifecycleError as ``Administration`` does."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    def tables(self, admission: Admission, workers: ThreadPoolExecutor) -> list[RpcTable]:
        """The methods of each service, ready for a server."""
        own = RpcTable(SERVICE, admission, workers)
        own.unary("Load", pb.LoadRequest, self.load, scope="admin")
        own.unary("Unload", pb.UnloadRequest, self.unload, scope="admin")
        own.unary("SetDefault", pb.SetDefaultRequest, self.set_default, scope="admin")
        own.unary("Rollback", pb.RollbackRequest, self.rollback, scope="admin")
        own.unary("Status", pb.StatusRequest, self.status, scope="admin")
        extension = RpcTable(OPEN_INFERENCE, admission, workers)
        extension.unary("RepositoryIndex", oip.RepositoryIndexRequest, self.repository_index, scope="admin")
        extension.unary("RepositoryModelLoad", oip.RepositoryModelLoadRequest, self.repository_load, scope="admin")
        extension.unary("RepositoryModelUnload", oip.RepositoryModelUnloadRequest, self.repository_unload, scope="admin")
        return [own, extension]

    async def load(self, request: pb.LoadRequest, call: Call) -> bytes:
        _note(call, "load", request.model, request.version)
        await self._administration.load(_name(request.model), _version(request.version))
        return await self._answer(request.model)

    async def unload(self, request: pb.UnloadRequest, call: Call) -> bytes:
        _note(call, "unload", request.model, request.version)
        await self._administration.unload(_name(request.model), _version(request.version))
        return await self._answer(request.model)

    async def set_default(self, request: pb.SetDefaultRequest, call: Call) -> bytes:
        _note(call, "set the default of", request.model, request.version)
        default, canary, share = _version(request.version), _version(request.canary_version), request.canary_share
        if bool(canary) != bool(share):
            raise RequestError("canary_version and canary_share go together: one of them is missing")
        if canary and not 0 < share < 1:
            raise RequestError(f"canary_share must be over 0 and under 1, got {share:g}")
        if canary and default in (0, canary):
            raise RequestError(f"version must be named beside a canary and differ from it, got {default} and {canary}")
        await self._administration.set_default(_name(request.model), Route(default, canary, share) if default else None)
        return await self._answer(request.model)

    async def rollback(self, request: pb.RollbackRequest, call: Call) -> bytes:
        _note(call, "roll back", request.model, 0)
        await self._administration.rollback(_name(request.model))
        return await self._answer(request.model)

    async def status(self, request: pb.StatusRequest, call: Call) -> bytes:
        return await self._answer(request.model)

    async def repository_index(self, request: oip.RepositoryIndexRequest, call: Call) -> bytes:
        response = oip.RepositoryIndexResponse()
        for status in await self._administration.status():
            state = OPEN_INFERENCE_STATES.get(status.state, "UNAVAILABLE")
            if state == "READY" or not request.ready:
                reason = status.reason or ("unloaded" if status.state == "UNLOADED" else "")
                response.models.add(name=status.name, version=str(status.version), state=state, reason=reason)
        return response.SerializeToString()

    async def repository_load(self, request: oip.RepositoryModelLoadRequest, call: Call) -> bytes:
        if request.parameters:
            raise RequestError(f"parameters: {min(request.parameters)[:40]!r} is unknown; a bundle brings its own configuration")
        _note(call, "load", request.model_name, 0)
        await self._administration.load(_name(request.model_name), 0)
        return oip.RepositoryModelLoadResponse().SerializeToString()

    async def repository_unload(self, request: oip.RepositoryModelUnloadRequest, call: Call) -> bytes:
        _note(call, "unload", request.model_name, 0)
        await self._administration.unload(_name(request.model_name), 0)
        return oip.RepositoryModelUnloadResponse().SerializeToString()

    async def _answer(self, model: str) -> bytes:
        statuses = await self._administration.status()
        return to_response([status for status in statuses if model in ("", status.name)]).SerializeToString()


def to_response(statuses: Sequence[VersionStatus]) -> pb.ControlResponse:
    """Statuses on the wire."""
    response = pb.ControlResponse()
    for status in statuses:
        response.versions.add(
            model=status.name,
            version=status.version,
            state=pb.VersionState.Value(f"VERSION_STATE_{status.state}"),
            reason=status.reason,
            digest=status.digest,
            traffic_share=status.share,
            calls=status.calls,
            queued_images=status.queued_images,
        )
    return response


def _note(call: Call, what: str, model: str, version: int) -> None:
    """Say in the log who wants what changed; whether it was, the models' own lines tell."""
    log.info("%s asks to %s %r%s", call.hold.account.name, what, model[:64], f", version {version}" if version else "")


def _name(model: str) -> str:
    if not model:
        raise RequestError("a model name is needed")
    return model


def _version(version: int) -> int:
    if version < 0:
        raise RequestError(f"a version must be 1 or more, or 0 for none in particular; got {version}")
    return version
