# ruff: noqa: E501  # a fault is a line
"""The faults that ``make mutate`` puts in, one at a time: small mistakes that a change could bring, and the tests to see them.

A fault names a function (a class; nothing after the colon: the whole file) and a piece of its code that is there exactly once.
Where the code has moved on, ``python -m tests.mutate --stale`` says so; nothing else asks.
"""

from __future__ import annotations

from typing import NamedTuple

WIRING = "tests/integration/test_wiring.py"
BATCHER = "tests/unit/test_batcher.py"
QUEUE = "tests/unit/test_fair_queue.py"
AUTHORISATION = "tests/unit/test_authorisation.py"
ACCESS = "tests/unit/test_access.py"
OVER_THE_WIRE = "tests/integration/test_access.py"
LABELS = "tests/integration/test_labels.py"
SERVE = "tests/integration/test_serve.py"
MODEL = "tests/unit/test_model.py"
RECONCILE = "tests/unit/test_reconcile.py"
RUNTIME = "tests/unit/test_runtime.py"
DEVICE_LATENTS = "tests/unit/test_device_latents.py"
STEP = "train/trainer/step.py"
DATASET = "tests/integration/test_dataset.py"
REFERENCE = "tests/unit/test_train_reference.py"
TRAIN = "tests/integration/test_train.py"
EXPORT = "tests/integration/test_export.py"
ENGINE = "tests/unit/test_engine.py"
LOADS = "tests/integration/test_load_reports.py"
FRONTS = "tests/unit/test_grpc_port.py"
THREADS = "tests/unit/test_threads.py"
THE_WAITING = "tests/unit/test_waiting.py"


class Fault(NamedTuple):
    """A mistake in one place, and what pytest is given to find it."""

    what: str
    place: str  # file:function
    before: str  # a space stands for any space or line's end
    after: str
    tests: str


CORE, QUEUES, BATCH = "serve/core/generate.py", "serve/batching/queue.py", "serve/batching/batcher.py"
CALLERS, TOKENS, TLS = "serve/access/identity.py", "serve/access/tokens.py", "serve/access/tls.py"
OIP, HTTP, RPC, ADMISSION = "serve/api/open_inference.py", "serve/api/http_call.py", "serve/api/rpc.py", "serve/api/admission.py"
METRICS, SERVER, LOOP = "serve/observability/metrics.py", "serve/server.py", "train/trainer/loop.py"
FRONT, CALL, HANDLING = "serve/ports/grpc_port.py", "serve/ports/grpc_call.py", "serve/ports/handling.py"
WAITING = "serve/waiting.py"
GENERATOR, PARITY, BUNDLE = "export/generator.py", "export/parity.py", "export/bundle.py"

FAULTS = [
    # core
    Fault("one digit too many in an answer", f"{CORE}:Core.generate", "count <= most:", "count <= most + 1:", SERVE),
    Fault("a caller's images are not held", f"{CORE}:Core.generate", "with account.hold(span.count)", "if True", f"{OVER_THE_WIRE} -k limits"),
    Fault("a model stays in use for ever", f"{CORE}:Core.generate", "model.in_use.leave()", "pass", f"{WIRING} -k knows_the_calls"),
    Fault("a model that is retired while a call begins answers it", f"{CORE}:Core._begin", "in_use.enter():", "in_use.enter() or True:", THREADS),
    Fault("a request's deadline is dropped", f"{CORE}:Core.generate", "request.deadline", "None", WIRING),
    Fault("a stream's deadline is dropped", f"{CORE}:Core.stream", "request.deadline", "None", WIRING),
    Fault("a stream's labels begin anew in every chunk", f"{CORE}:Core.stream", ", part.start,", ", 0,", LABELS),
    Fault("a label one too high is taken", f"{CORE}:_checked_labels", ">= manifest.", "> manifest.", LABELS),
    Fault("latents that are not finite are taken", f"{CORE}:_explicit", "not finite.all()", "False", SERVE),
    Fault("an interpolation's middle has the farther end's label", f"{CORE}:_between", "(steps - steps // 2, steps // 2)", "(steps // 2, steps - steps // 2)", LABELS),
    Fault("truncation is ignored", f"{CORE}:_addressed", ", truncation=truncation", "", LABELS),
    Fault("traffic is not split by the seed", f"{CORE}:Core._resolve", ": span.seed)", ": 0)", WIRING),
    Fault("the indices beyond the stream's end are taken", f"{CORE}:_addressed", "start >= INDEX_LIMIT or start + count > INDEX_LIMIT", "start > INDEX_LIMIT", SERVE),
    # batching
    Fault("first come, first served", f"{QUEUES}:FairQueue._enter", "ticket.tag + min(waiting, self._quantum), waiting", "0.0, 0", QUEUE),
    Fault("one digit waits for chunks about to be finished", f"{QUEUES}:FairQueue._push", "- max(0, self._quantum - count)", "", QUEUE),
    Fault("expired rows are run", f"{QUEUES}:FairQueue._take_from", "deadline <= now:", "deadline <= 0:", QUEUE),
    Fault("bulk starves", f"{QUEUES}:FairQueue.take", "self._batches_without_bulk >= BULK_TURN - 1", "False", QUEUE),
    Fault("the queue takes twice its bound", f"{QUEUES}:FairQueue._fits", "<= self.max_images", "<= 2 * self.max_images", QUEUE),
    Fault("bulk fills the queue against interactive callers", f"{QUEUES}:FairQueue._fits", "level.images", "self.images", QUEUE),
    Fault("tickets that left stay in the heap", f"{QUEUES}:FairQueue.discard", "level.sweep()", "pass", QUEUE),
    Fault("a cancelled ticket's rows are run", f"{BATCH}:Batcher.cancel", "self._queue.discard(ticket)", "0", f"{BATCHER} {WIRING} -k cancel"),
    Fault("a ticket that was cancelled first is queued", f"{BATCH}:Batcher.submit", "ticket.cancelled", "False", f"{BATCHER} -k cancel"),
    Fault("the watchdog sleeps", f"{BATCH}:Batcher.check_stalled", "- self.limits.watchdog_s", "- 1e9", f"{BATCHER} {WIRING} -k hang or hung"),
    Fault("a lost slot is not replaced", f"{BATCH}:Batcher.evict", "self._slots.replace()", "pass", f"{BATCHER} {WIRING} -k hang or hung or replaced"),
    Fault("a lost slot's callers wait for ever", f"{BATCH}:Batcher.evict", "self._deliver(failed)", "pass", f"{BATCHER} -k hang"),
    Fault("the hint when to return ignores the queue", f"{QUEUES}:FairQueue.push", "self.images * seconds_per_image", "seconds_per_image", f"{QUEUE} {WIRING}"),
    Fault("rows go to the wrong callers", "serve/batching/ticket.py:scatter", "begin:offset", ":count", BATCHER),
    Fault("a batch's failure is nobody's", f"{BATCH}:Batcher.end_batch", '"failed")', '"failed")[:0]', f"{BATCHER} -k raises --timeout=60"),
    Fault("replacements are tried without a pause", "serve/batching/slots.py:SlotPool._backoff_s", "losses <= 1 else", "losses <= 1000 else", BATCHER),
    Fault("a lone caller's rows are left to one slot", "serve/batching/policy.py:BatchPolicy.images", "queue.callers != 1", "True", BATCHER),
    Fault("what many wait for is shared out as if one did", "serve/batching/policy.py:BatchPolicy.images", "queue.callers != 1", "False", BATCHER),
    Fault("a lone caller's rest waits for company", "serve/batching/policy.py:BatchPolicy.left_s", "and lone.taken:", "and False:", BATCHER),
    Fault("a batch waits however full it is", "serve/batching/policy.py:BatchPolicy.left_s", "queue.images >= self._max_batch_size", "False", BATCHER),
    Fault("pixels of the next batch overwrite a labelled one's labels", "serve/batching/slot.py:Slot._run", 'feeds["labels"].copy()', 'feeds["labels"]', "tests/unit/test_batcher.py tests/unit/test_engine.py tests/integration/test_labels.py"),
    # access
    Fault("ModelInfer is open to all", f"{OIP}:OpenInferenceService.table", "stepped=True)", 'stepped=True, scope="open")', AUTHORISATION),
    Fault("an expired token is taken", f"{TOKENS}:TokenFile.check", "token.expires_at <= time.time()", "False", f"{ACCESS} {AUTHORISATION}"),
    Fault("a token's scopes are not looked at", f"{CALLERS}:Accounts.identify", "scope not in token.scopes", "False", f"{ACCESS} {AUTHORISATION}"),
    Fault("a token's secret is not looked at", f"{TOKENS}:TokenFile.check", "not hmac.compare_digest(hashed, token.sha256 if token else NO_HASH) or", "", f"{ACCESS} {AUTHORISATION}"),
    Fault("a caller's limit is per request", f"{CALLERS}:Account._holding", "self.images + images", "images", f"{ACCESS} {OVER_THE_WIRE} -k limit"),
    Fault("a caller's images are never given back", f"{CALLERS}:Account._holding", "self.images -= images", "pass", f"{ACCESS} {OVER_THE_WIRE} -k limit"),
    Fault("an IPv4 caller over IPv6 is somebody else", f"{CALLERS}:peer_address", 'getattr(address, "ipv4_mapped", None) or', "", ACCESS),
    Fault("client certificates are not asked for", f"{TLS}:Certificates.credentials", "require_client_authentication=self._client_auth", "require_client_authentication=False", f"{OVER_THE_WIRE} -k certificate"),
    # api
    Fault("gRPC's deadline does not reach the call", f"{RPC}:RpcTable._begin", "None if remaining is None else time.monotonic() + remaining", "None", WIRING),
    Fault("the drain's gate is open", f"{ADMISSION}:InFlight.enter", "_calls.enter():", "_calls.enter() and False:", WIRING),
    Fault("a cancelled call is counted as OK", f"{ADMISSION}:Call.__init__", "StatusCode.CANCELLED", "StatusCode.OK", WIRING),
    Fault("no hint when to return over gRPC", f"{RPC}:RpcTable._abort", "answer.retry_after_s is not None", "False", WIRING),
    Fault("no hint when to return over HTTP", f"{HTTP}:_refused", "refusal.retry_after_s is not None", "False", f"{WIRING} tests/integration/test_http_api.py"),
    Fault("HTTP requests have no deadline", f"{HTTP}:guarded.handle", "time.monotonic() + TIMEOUT_S", "None", WIRING),
    Fault("a full queue is UNAVAILABLE", "serve/api/status.py:", "QueueFullError: (Code.RESOURCE_EXHAUSTED, 429)", "QueueFullError: (Code.UNAVAILABLE, 503)", f"tests/unit/test_status.py {WIRING}"),
    Fault("digits over Open Inference are not counted", f"{OIP}:_encode", "call.encoded(digits, time.perf_counter() - started)", "pass", WIRING),
    Fault("Open Inference is always ready", f"{OIP}:OpenInferenceService.server_ready", "self._ready()", "True", WIRING),
    Fault("a batch size is chosen though it makes fewer images", "export/batch_size.py:choose", ">= WORTH * best", ">= 0.0 * best", "tests/integration/test_commands.py"),
    Fault("typed values over 127 are cut", "serve/api/encoding.py:packed_varints", "flat > 0x7F", "flat > 0xFF", "tests/unit/test_encode.py"),
    Fault("a repeated HTTP parameter's last value counts", "serve/api/http.py:read_query", "name in values", "False", "tests/integration/test_http_api.py"),
    Fault("streams are interactive", "serve/api/digits_v1.py:DigitService.generate_stream", "Priority.BULK,", "Priority.INTERACTIVE,", WIRING),
    # models and runtime
    Fault("a model that fails its golden check goes on", "serve/models/model.py:Model.run", "self.breached and not checking", "False", MODEL),
    Fault("a model that is being released takes another call", f"{WAITING}:RefCount.enter", "self._closed", "False", f"{THREADS} {RECONCILE}"),
    Fault("a model is released while it is in use", "serve/models/model.py:Model.release", "not self.in_use.calls and", "", RECONCILE),
    Fault("a model is released while its batches run", "serve/models/model.py:Model.release", "and self.batcher.quiet", "", "tests/unit/test_model.py -k released"),
    Fault("a failed ticket is an answer", "serve/models/model.py:Model.run", "ticket.error is not None", "False", MODEL),
    Fault("self-checks go before callers", "serve/models/model.py:Model.self_check", "Priority.BULK,", "Priority.INTERACTIVE,", WIRING),
    Fault("readiness leaves out the canary", "serve/models/catalog.py:Catalog.ready", "in served.route.versions", "in [served.route.default]", f"{WIRING} {RECONCILE}"),
    Fault("one failing look unloads a served model", "serve/models/reconcile.py:Reconciler._look_at_models", "{**before.get(name, {}), **now.get(name, {})}", "now.get(name, {})", RECONCILE),
    Fault("a file's digest is not looked at", "serve/models/repository.py:read_bundle", "sha256(content) != digest", "False", "tests/unit/test_bundle_reading.py"),
    Fault("the golden check at loading passes all", "serve/engine/session.py:Engine.check_golden", "golden_difference(manifest, samples.pixels, got)", "None", "tests/unit/test_engine.py tests/unit/test_bundle_reading.py"),
    Fault("connections live for ever", f"{FRONT}:GrpcPort.__init__", "settings.max_connection_age_s:", "False:", WIRING),
    Fault("two processes may share the port", f"{FRONT}:GrpcPort.__init__", 'so_reuseport", 0)', 'so_reuseport", 1)', FRONTS),
    Fault("a large request is taken", f"{FRONT}:GrpcPort.__init__", "MAX_REQUEST_BYTES", "-1", FRONTS),
    Fault("what comes while stopping is answered", f"{FRONT}:GrpcPort._called", "self._stopping", "False", FRONTS),
    Fault("what comes while stopping is cut off", f"{FRONT}:GrpcPort.stop", "await self._handling.wait(deadline)", "pass", FRONTS),
    Fault("stopping waits for ever", f"{FRONT}:GrpcPort.stop", "self._server.cancel_all_calls()", "pass", FRONTS),
    Fault("who has left is computed for", f"{HANDLING}:Handling.leave", "self._leave(key) else: self.later(self._leave, key)", "pass", FRONTS),
    Fault("who has left is computed for, without an event loop", f"{HANDLING}:Handling.leave", "self._leave(key)", "pass", FRONTS),
    Fault("without an event loop a call is given up after its end", f"{BATCH}:Batcher.cancel", "return False", "return True", BATCHER),
    Fault("a refused piece of work is never told of", f"{WAITING}:Steps._step", "error = refused", "return", THE_WAITING),
    Fault("calls share a context", f"{WAITING}:Steps.__init__", "_stepping().copy()", "_stepping()", THE_WAITING),
    Fault("what ends after its waiter has left breaks", f"{WAITING}:_wake", "not waiter.done()", "True", THE_WAITING),
    Fault("the first failure ends what was put off", f"{WAITING}:Deferred.__exit__", "except Exception:", "except ZeroDivisionError:", THE_WAITING),
    Fault("a caller's images are counted by two threads at once", f"{CALLERS}:Account._holding", "with self.lock: self.images -= images", "left = self.images; time.sleep(0); self.images = left - images", THREADS),
    Fault("two threads make two accounts of one caller", f"{CALLERS}:Accounts._account", "with self._lock: account = self._known.get(name)", "if True:\n            account = self._known.get(name); time.sleep(0.001)", THREADS),
    Fault("a route is seen half changed", "serve/models/catalog.py:Catalog.find", "versions, route = served.versions, served.route", "versions = served.versions; route = self._served[name].route", THREADS),
    Fault("a handler's error leaves its caller waiting", f"{HANDLING}:Handling._answer", 'call.end(grpc.StatusCode.INTERNAL, "the call could not be answered")', "pass", FRONTS),
    Fault("a call without a request waits for ever", f"{FRONT}:GrpcPort._begin", 'call.end(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")', "pass", FRONTS),
    Fault("an unknown method waits for ever", f"{FRONT}:GrpcPort._called", 'call.end(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}")', "pass", FRONTS),
    Fault("nobody looks whether callers have left", f"{FRONT}:GrpcPort._watch", "call.watch()", "pass", FRONTS),
    Fault("a stream runs ahead of its reader", f"{CALL}:GrpcioCall.send", "await self._done(self._sending(self._core.SendMessageOperation(message, FLAGS))", "self._call.start_server_batch(self._sending(self._core.SendMessageOperation(message, FLAGS)), _nothing", FRONTS),
    Fault("a call that is watched is watched again at its end", f"{CALL}:GrpcioCall._to_be_watched", "return not watched", "return True", FRONTS),
    Fault("a status loses its metadata", f"{CALL}:GrpcioCall.end", "trailing or self", "self", f"{FRONTS} {WIRING}"),
    Fault("a stopping server refuses nobody", f"{SERVER}:Server._stop", "await self._in_flight.close(settings.drain_deadline_s)", "pass", WIRING),
    Fault("a stopping server says that it is ready", f"{SERVER}:Server._stop", "self._health.draining = True", "pass", WIRING),
    Fault("liveness never fails", "serve/ports/health.py:Health.not_alive", "> WITHOUT_SLOTS_S:", "> 1e9:", RUNTIME),
    Fault("a background task dies of its first error", "serve/background.py:repeat", "except Exception:", "except ZeroDivisionError:", RUNTIME),
    # observability
    Fault("padding is not counted", f"{METRICS}:ModelMetrics.__init__.observe_batches", "bucket - images for", "0 for", WIRING),
    Fault("dropped rows are counted as one", f"{METRICS}:ModelMetrics.dropped", ".inc(images)", ".inc()", WIRING),
    Fault("digits are counted as requests", f"{METRICS}:ModelMetrics.__init__.observe_answers", "encoding)(images)", "encoding)(1)", WIRING),
    Fault("what was kept is not observed when metrics are read", f"{METRICS}:Metrics.collect", "records.flush()", "pass", WIRING),
    # CUDA
    Fault("the kernel takes the block before", "serve/engine/latents.cu:", "+ block + 1;", "+ block;", DEVICE_LATENTS),
    Fault("the kernel forgets the counter's carry", "serve/engine/latents.cu:", "+ (low < base)", "", DEVICE_LATENTS),
    Fault("the kernel draws over a label that was asked for", "serve/engine/latents.cu:", ".label < 0 ?", ".label < 1ll << 62 ?", DEVICE_LATENTS),
    Fault("the kernel truncates nothing", "serve/engine/latents.cu:", "(tail != 0.0f", "(tail < 0.0f", DEVICE_LATENTS),
    Fault("the trap among cuDNN's searches is offered", "serve/settings.py:", '"HEURISTIC")', '"HEURISTIC", "DEFAULT")', "tests/unit/test_settings.py"),
    Fault("the device is not told which label is wanted", "serve/engine/device_latents.py:DeviceLatents.fill", "if span.labels is None else span.labels", "", DEVICE_LATENTS),
    Fault("latents on the device are believed untried", "serve/engine/cuda_engine.py:CudaEngine._begin_drawing", "self._drawing_problem(drawing, LatentReader(*shape))", "None", DEVICE_LATENTS),
    Fault("a thread keeps the capture mode that forbids what it does", "serve/engine/cuda.py:_call", 'of != "nvrtc" and not hasattr(_this_thread, "minds_own_captures")', "False", "tests/unit/test_cuda_calls.py"),
    Fault("a caller's own latents are drawn over", "serve/engine/cuda_engine.py:CudaEngine.assemble", "or any(span.explicit is not None for span in spans)", "", DEVICE_LATENTS),
    Fault("the labels that the device drew are not fetched", "serve/engine/cuda_engine.py:CudaEngine._draw", 'self._buffers.fetch("labels", rows)', "pass", DEVICE_LATENTS),
    Fault("inputs are not copied to the device", "serve/engine/device_buffers.py:PairedMemory.upload", "self.device.copy_to_device(self.address(name), array.ctypes.data, rows * array.strides[0], self.stream)", "del array", ENGINE),
    # data sets
    Fault("a filter keeps what it was to refuse", "serve/dataset/filter.py:filtered_digits", ">= dataset.filter", "< 2", DATASET),
    Fault("what a filter refuses depends on the shard", "serve/dataset/shards.py:Generator.digits", "else TASK", "else BATCH", DATASET),
    Fault("a filter forgets whose label is in turn", "serve/dataset/header.py:Dataset.chosen_rows", "[given % len(self.labels)]", "[indices % len(self.labels)]", DATASET),
    Fault("a filtered digit's index is the one that it was refused at", "serve/dataset/filter.py:filtered_digits", "[good], others[good]", "[good], given[good]", DATASET),
    # train
    Fault("real and fake are swapped", f"{STEP}:Step.alternating", "real_logits.float(), fake_logits", "fake_logits.float(), real_logits", REFERENCE),
    Fault("fakes are judged with the real images' labels", f"{STEP}:Step.alternating", "fake, *labels)", "fake, *real[1:])", REFERENCE),
    Fault("the discriminator's gradients pile up", f"{STEP}:Step.alternating", "self.discriminator_optimizer.zero_grad()", "pass", REFERENCE),
    Fault("the generator's gradients pile up", f"{STEP}:Step.alternating", "self.generator_optimizer.zero_grad()", "pass", REFERENCE),
    Fault("the first layer's maps are turned", "train/models.py:PointConvTranspose2d.forward", "(0, 2, 3, 1)", "(0, 3, 2, 1)", "tests/unit/test_train_networks.py"),
    Fault("a status has a text of any length", "serve/api/status.py:refusal", "len(text) <= MOST_CHARACTERS", "text", "tests/unit/test_status.py"),
    Fault("a picture has headers of any length", "serve/api/http.py:_picture", "and digits.count <= LABELS_IN_HEADER", "", "tests/integration/test_http_api.py -k headers"),
    Fault("PyTorch writes checkpoints to the disk itself", "train/checkpoint.py:write_atomically", "stream.write(content.getbuffer())", "write(stream)", f"{TRAIN} -k fit"),
    Fault("what was half-written stays", "serve/files.py:replacing", "each.unlink()", "pass", "tests/integration/test_dataset.py -k full_disk"),
    Fault("joined files are written in their places", "serve/files.py:replacing", 'path.with_name(f".{path.name}-{secrets.token_hex(8)}")', "path", "tests/integration/test_dataset.py -k full_disk"),
    Fault("two may rewrite a file at the same time", "serve/files.py:_has_locked", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", "tests/unit/test_access.py tests/unit/test_admin.py -k same_time"),
    Fault("a token is added beside others' adding", f"{TOKENS}:main", "with locked(flags.file.parent)", "if True", "tests/unit/test_access.py -k same_time"),
    Fault("an edit undoes another's", "serve/admin.py:main", "with locked(path.parent): before = watched_serving_file(path).value", "before = watched_serving_file(path).value\n        with locked(path.parent):", "tests/unit/test_admin.py -k same_time"),
    Fault("a version that answers is unloaded", "serve/admin.py:_Change._unload", "route.share(version)", "False", "tests/unit/test_admin.py"),
    Fault("a version that is not there is routed to", "serve/admin.py:_Change._checked", "version not in self._there", "False", "tests/unit/test_admin.py"),
    Fault("the routes before grow without end", "serve/admin.py:_Change._routed", "[-HISTORY:]", "", "tests/unit/test_admin.py"),
    Fault("a file that could not be read is not tried again", "serve/files.py:Watched.look", "return None self._read()", "return None\n            self._states = now\n            self._read()", "tests/unit/test_files.py"),
    Fault("chmod is no change of a file", "serve/files.py:file_state", "status.st_ctime_ns", "0", "tests/unit/test_files.py"),
    Fault("a pipe is read as a file", "serve/files.py:read_regular", "not stat.S_ISREG(status.st_mode)", "False", "tests/unit/test_files.py"),
    Fault("a dangling link is gone", "serve/models/repository.py:Repository._look", "and not path.is_symlink()", "", "tests/unit/test_unreadable.py"),
    Fault("what cannot be read is gone", "serve/models/repository.py:Repository._look", 'self._before.get(path, (None, ""))', '(None, "")', "tests/unit/test_unreadable.py"),
    Fault("another model answers for a default that is gone", "serve/models/catalog.py:Catalog.choose_default", "not self._chosen and self._served", "self._served", "tests/unit/test_unreadable.py"),
    Fault("an empty folder unloads everything", "serve/models/reconcile.py:Reconciler._look_at_models", "self.catalog.names() and not now", "False", "tests/unit/test_unreadable.py"),
    Fault("each poll leaves another thread in a look that hangs", "serve/models/reconcile.py:Reconciler._look", "last is None or last.done()", "True", "tests/unit/test_unreadable.py"),
    Fault("a load that hangs holds up every other model", "serve/models/reconcile.py:Reconciler.poll", "timeout=LOAD_PATIENCE_S", "timeout=None", "tests/unit/test_unreadable.py -k load"),
    Fault("weights in another file are read", "serve/engine/graph.py", '"tensor": {13: ELSEWHERE},', "", "tests/unit/test_graph.py"),
    Fault("any operator may run", "serve/engine/graph.py:_check", "not in OPERATORS", "in ()", "tests/unit/test_graph.py"),
    Fault("a reader who has left is complained of", "serve/command_line.py:run_command", "drop_output() status", "status", "tests/integration/test_commands.py -k reader"),
    Fault("a flag's number has no bounds", "serve/command_line.py:within.read", "not low <= value <= high", "False", "tests/integration/test_commands.py -k bounds"),
    Fault("a server stops when nobody reads what it prints", "serve/cli.py:_announce", "drop_output()", "raise", "tests/integration/test_commands.py -k nobody_reads"),
    Fault("a lock is waited for without end", "serve/files.py:locked", "time.monotonic() > deadline", "False", "tests/unit/test_access.py -k locked"),
    Fault("Ctrl-C is complained of", "serve/command_line.py:run_command", "except KeyboardInterrupt", "except ZeroDivisionError", "tests/integration/test_dataset.py -k signal"),
    Fault("two containers write into one file", "serve/files.py:replacing", "secrets.token_hex(8)", "os.getpid()", "tests/integration/test_dataset.py -k same_number"),
    Fault("the loop is left in evaluation mode", f"{LOOP}:Trainer._draw", "shown.train()", "pass", REFERENCE),
    Fault("the average is upside down", f"{LOOP}:Trainer._average", "averages, self.followed", "followed, self.averages", REFERENCE),
    Fault("every epoch has the same order", f"{LOOP}:Trainer._batches", "1_000_003 + epoch)", "1_000_003)", REFERENCE),
    Fault("the generator wants to be found out", "train/trainer/losses.py:generator_loss", "torch.ones_like", "torch.zeros_like", REFERENCE),
    Fault("the mean of the losses is their sum", "train/trainer/losses.py:discriminator_loss", '/ 2 if joined_by == "mean" else total', "", REFERENCE),
    Fault("the learning rate does not decay", f"{LOOP}:Trainer.fit", "self.update.decay(self.step / self.total_steps)", "pass", f"{TRAIN} -k decays"),
    Fault("a resumed run draws the first noise again", f"{STEP}:Step.load_state", 'self.noise.set_state(state["noise"])', "pass", f"{TRAIN} -k signal"),
    Fault("a signal saves nothing", f"{LOOP}:Trainer.fit", "due or last or stopping", "due or last", f"{TRAIN} -k signal"),
    Fault("the last step is not saved", f"{LOOP}:Trainer.fit", "due or last or stopping", "due or stopping", f"{TRAIN} -k last_step"),
    Fault("pairs are compared the wrong way round", f"{STEP}:Step.simultaneous", "relativistic_loss(fake_logits - real_logits)", "relativistic_loss(real_logits - fake_logits)", REFERENCE),
    Fault("the generator's gradient is not weighed by its own loss", f"{STEP}:Step.simultaneous", "-(real_logits - fake_logits).", "-(fake_logits - real_logits).", REFERENCE),
    Fault("a fake is paired with another label", f"{STEP}:Step.simultaneous", "labels)\n        seen", "labels.flip(0))\n        seen", REFERENCE),
    Fault("the label loss reads fakes", f"{STEP}:Step.simultaneous", "logits[: len(images)]", "logits[len(images) :]", REFERENCE),
    Fault("fakes are never moved", f"{STEP}:Step._shifted", ") < SHIFTED_SHARE", ") * torch.tensor([[[1.0], [9.0]]]) < SHIFTED_SHARE", REFERENCE),
    Fault("everything is moved", f"{STEP}:", "SHIFTED_SHARE = 0.5", "SHIFTED_SHARE = 1.0", REFERENCE),
    Fault("the label loss does not decay", f"{STEP}:Step.decay", "_decayed(config.label_loss, config.label_loss_end, done)", "config.label_loss", REFERENCE),
    Fault("closing an engine fails with a lost device", "serve/engine/device_buffers.py:PairedMemory.release", "with suppress(EngineError)", "if True", ENGINE),
    Fault("a missing library of CUDA's is no refusal", "serve/engine/provider.py:_cuda_missing", "load_libraries()", "pass", "tests/unit/test_cuda_calls.py"),
    Fault("the label loss weighs nothing", f"{STEP}:Step.simultaneous", "self.label_weight", "0", REFERENCE),
    Fault("real digits are judged with other shares of the labels", "train/evaluation/evaluate.py:Evaluator._samples_of", "== label][:count", "== 9 - label][:count", "tests/unit/test_quality.py"),
    Fault("the penalty is as light as if it came every step", f"{STEP}:Step.penalise", "* self.config.penalty_every", "", REFERENCE),
    Fault("the penalty looks at real images alone", f"{STEP}:Step.penalise", "images, fake)).", "images, images)).", REFERENCE),
    Fault("a gradient in another memory layout", f"{STEP}:Step.penalise", "torch.empty_like(parameter).copy_(self.ranks.mean(gradient))", "self.ranks.mean(gradient)", REFERENCE),
    Fault("the second judge is the first", "train/evaluation/evaluate.py:Evaluator._judged", "_second, self._second.read(samples)", "_judge, read", "tests/unit/test_quality.py"),
    Fault("every classifier has the same seed", "train/evaluation/evaluate.py:accuracy_score", "epochs, seed,", "epochs, 0,", "tests/unit/test_quality.py"),
    Fault("the best digits are drawn as the worst", "train/evaluation/evaluate.py:_draw_extremes", 'order[:SHOWN]), ("best.png", order.flip(0)[:SHOWN])', 'order.flip(0)[:SHOWN]), ("best.png", order[:SHOWN])', "tests/unit/test_quality.py"),
    # export
    Fault("a label's gain is added", f"{GENERATOR}:LabelledBlock.forward", "maps) * gain", "maps) + gain", EXPORT),
    Fault("pixels are cut, not rounded", f"{GENERATOR}:ServedGenerator.outputs", ".round(images", ".floor(images", EXPORT),
    Fault("the trained range's offset is turned round", f"{GENERATOR}:ServedGenerator.__init__", "offset = -low /", "offset = low /", EXPORT),
    Fault("a NaN passes for parity", f"{PARITY}:difference", "not images.max() <=", "images.max() >", EXPORT),
    Fault("images may differ by twice the tolerance", f"{PARITY}:difference", "<= tolerance.images", "<= 2 * tolerance.images", EXPORT),
    Fault("pixels may differ by one level more", f"{PARITY}:difference", "pixel_levels:", "pixel_levels + 1:", EXPORT),
    Fault("the generator is exported, not its average", "train/models.py:trained_generator", '"average" if config.average_decay else "generator"', '"generator"', EXPORT),
    Fault("a checkpoint older than its run is exported", "train/checkpoint.py:final_checkpoint", 'state["step"] != last', "False", EXPORT),
    Fault("a quality of another step is published", f"{BUNDLE}:_quality", 'step != checkpoint["step"]', "False", EXPORT),
    Fault("a floor is a ceiling", f"{BUNDLE}:_quality", "value >= floor", "value <= floor", EXPORT),
    # readiness, load reports, log points
    Fault("ready only with every model", "serve/ports/health.py:Health.not_ready", "if any(self.", "if all(self.", RUNTIME),
    Fault("one model's readiness is any's", "serve/ports/health.py:Health.not_ready", "if model is None else [model]", "", RUNTIME),
    Fault("a refusal while draining counts as a fault", f"{ADMISSION}:Call.failed", "isinstance(error, DrainingError)", "False", WIRING),
    Fault("load reports are sent to everybody", f"{RPC}:RpcTable._report_load", "self._admission.load_reports is not None", "True", LOADS),
    Fault("a load report has its fields swapped", "serve/ports/load_report.py:", "bytes([6 << 3 | 1]), bytes([9 << 3 | 1])", "bytes([9 << 3 | 1]), bytes([6 << 3 | 1])", LOADS),
    Fault("a busy process reports that it is idle", "serve/ports/load_report.py:LoadReports._refresh", "load.busy_s - self._busy_s", "self._busy_s - load.busy_s", LOADS),
    Fault("a kernel without IPv6 is asked for it", "serve/ports/http_connections.py:usable_host", "not socket.has_dualstack_ipv6()", "False", "tests/integration/test_serve_start.py -k ipv6"),
    Fault("log points are counted through the run alone", f"{LOOP}:Trainer._is_log_point", "% self.steps_per_epoch", "", REFERENCE),
    Fault("a mean's window is one batch too long", f"{LOOP}:Trainer._log", "log_points else -1", "log_points else 0", REFERENCE),
    Fault("the last save is not in a run's time", f"{LOOP}:Trainer._finish", "self._count_time()", "pass", "tests/integration/test_runs.py -k stopped"),
    Fault("a URL has as little room as aiohttp gives it", "serve/ports/http_connections.py:", "LONGEST_LINE = 32 * 1024", "LONGEST_LINE = 8190", "tests/integration/test_http_api.py -k largest"),
    # CUDA, by its stand-ins
    Fault("a lost device leaves its model ready", "serve/models/model.py:Model.ready", "and self.batcher.device_lost is None", "", WIRING),
    Fault("a lost device's process goes on", f"{SERVER}:Server._check_stalled", "model.batcher.device_lost and not self.device_lost", "False", WIRING),
    Fault("a CUDA failure is one run's affair", "serve/engine/cuda_engine.py:CudaEngine.run", "CUDA_FAILURE.search(str(error))", "False", ENGINE),
    Fault("answers are read before they are there", "serve/engine/device_buffers.py:DeviceBuffers.download", "self.device.wait(self.stream)", "pass", ENGINE),
    Fault("the last slot is lent too", "serve/engine/device_buffers.py:OutputSlots.answer", "self._free and", "", ENGINE),
    Fault("a slot comes back while it is read", "serve/engine/device_buffers.py:OutputSlots.answer", "return lent[:rows]", "self._free.append(slot); return lent[:rows]", ENGINE),
    Fault("runs are not waited for though they are wrong", "serve/engine/cuda_engine.py:CudaEngine._stop_waiting", "self._problem(samples) or self._problem(samples)", "None", ENGINE),
    Fault("an old driver is taken", "serve/engine/driver.py:why_unusable", "LEAST_VERSION", "0", "tests/integration/test_cuda_start.py"),
    Fault("a container's quota is not looked at in training", "train/device.py:limit_threads", "min(torch.get_num_threads(), usable_cores())", "torch.get_num_threads()", "tests/unit/test_train_device.py"),
    Fault("bf16 is taken where it is imitated", f"{STEP}:Step.__init__", "has_bf16(self.device)", "True", "tests/unit/test_train_step.py"),
    Fault("a GPU that imitates bf16 has it", "train/device.py:has_bf16", "including_emulation=False", "including_emulation=True", "tests/unit/test_train_device.py"),
    Fault("a resumed run captures as it was begun", f"{STEP}:Step.load_state", "update(capturable=self.capturable, lr=self.rate)", "update()", "tests/unit/test_train_step.py"),
]  # fmt: skip
