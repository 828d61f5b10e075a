# ruff: noqa: E501  # a fault is a line
"""The faults that ``make mutate`` puts in, one at a time: small mistakes that a change could bring, and the tests to see them.

``before`` stands exactly once in its file; a change of that line moves the fault along.
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
FRONTS = "tests/unit/test_fronts.py"
THREADS = "tests/unit/test_threads.py"
THE_WAITING = "tests/unit/test_waiting.py"


class Fault(NamedTuple):
    """A mistake in one file, and what pytest is given to find it."""

    what: str
    file: str
    before: str
    after: str
    tests: str


CORE, QUEUES, BATCH = "serve/core/generate.py", "serve/batching/queue.py", "serve/batching/batcher.py"
CALLERS, TOKENS, TLS = "serve/access/identity.py", "serve/access/tokens.py", "serve/access/tls.py"
OIP, HTTP, RPC, ADMISSION = "serve/api/open_inference.py", "serve/api/http_call.py", "serve/api/rpc.py", "serve/api/admission.py"
METRICS, SERVER, LOOP = "serve/observability/metrics.py", "serve/server.py", "train/trainer/loop.py"
FRONT, CALL, HANDLING = "serve/ports/grpc_port.py", "serve/ports/grpc_call.py", "serve/runtime/handling.py"
WAITING = "serve/waiting.py"
GENERATOR, PARITY, BUNDLE = "export/generator.py", "export/parity.py", "export/bundle.py"

FAULTS = [
    # core
    Fault("one digit too many in an answer", CORE, "<= span.count <= most:", "<= span.count <= most + 1:", SERVE),
    Fault("a caller's images are not held", CORE, "with account.hold(span.count):", "if True:", f"{OVER_THE_WIRE} -k limits"),
    Fault("a model stays in use for ever", CORE, "            return _digits(model, ticket, request)\n        finally:\n            model.in_use.leave()\n", "            return _digits(model, ticket, request)\n        finally:\n            pass\n", f"{WIRING} -k knows_the_calls"),
    Fault("a model that is retired while a call begins answers it", CORE, "if model.in_use.enter():", "if model.in_use.enter() or True:", THREADS),
    Fault("a request's deadline is dropped", CORE, "request.outputs, request.priority, request.deadline)\n            return", "request.outputs, request.priority, None)\n            return", WIRING),
    Fault("a stream's deadline is dropped", CORE, "request.deadline, waits_for_room=True)", "None, waits_for_room=True)", WIRING),
    Fault("a stream's labels begin anew in every chunk", CORE, "in_turn(labels, part.start, part.count)", "in_turn(labels, 0, part.count)", LABELS),
    Fault("a label one too high is taken", CORE, "(numbers >= manifest.labels)", "(numbers > manifest.labels)", LABELS),
    Fault("latents that are not finite are taken", CORE, "if not finite.all():", "if False:", SERVE),
    Fault("an interpolation's middle has the farther end's label", CORE, "(steps - steps // 2, steps // 2)", "(steps // 2, steps - steps // 2)", LABELS),
    Fault("truncation is ignored", CORE, "start, count, truncation=truncation)", "start, count)", LABELS),
    Fault("traffic is not split by the seed", CORE, "request.version, lambda: span.seed)", "request.version, lambda: 0)", WIRING),
    Fault("the indices beyond the stream's end are taken", CORE, "if start >= INDEX_LIMIT or start + count > INDEX_LIMIT:", "if start > INDEX_LIMIT:", SERVE),
    # batching
    Fault("first come, first served", QUEUES, "[ticket.tag + min(waiting, self._quantum), waiting,", "[0.0, 0,", QUEUE),
    Fault("one digit waits for chunks about to be finished", QUEUES, "level.virtual - max(0, self._quantum - count)", "level.virtual", QUEUE),
    Fault("expired rows are run", QUEUES, "ticket.deadline <= now:", "ticket.deadline <= 0:", QUEUE),
    Fault("bulk starves", QUEUES, "self._batches_without_bulk >= BULK_TURN - 1", "False", QUEUE),
    Fault("the queue takes twice its bound", QUEUES, "<= self.max_images\n", "<= 2 * self.max_images\n", QUEUE),
    Fault("bulk fills the queue against interactive callers", QUEUES, "return level.images + ticket", "return self.images + ticket", QUEUE),
    Fault("tickets that left stay in the heap", QUEUES, "            level.sweep()\n", "", QUEUE),
    Fault("a cancelled ticket's rows are run", BATCH, "            dropped = self._queue.discard(ticket)\n            self._wake", "            dropped = 0\n            self._wake", f"{BATCHER} {WIRING} -k cancel"),
    Fault("a ticket that was cancelled first is queued", BATCH, "            if ticket.cancelled:  # by", "            if False:  # by", f"{BATCHER} -k cancel"),
    Fault("the watchdog sleeps", BATCH, "now - self.limits.watchdog_s", "now - 1e9", f"{BATCHER} {WIRING} -k hang or hung"),
    Fault("a lost slot is not replaced", BATCH, "        self._slots.replace()\n", "", f"{BATCHER} {WIRING} -k hang or hung or replaced"),
    Fault("a lost slot's callers wait for ever", BATCH, "        self._observer.failed(reason)\n        self._deliver(failed)\n        self._slots", "        self._observer.failed(reason)\n        self._slots", f"{BATCHER} -k hang"),
    Fault("the hint when to return ignores the queue", QUEUES, "self.images * seconds_per_image", "seconds_per_image", f"{QUEUE} {WIRING}"),
    Fault("rows go to the wrong callers", "serve/batching/ticket.py", "array[begin:offset] for", "array[:count] for", BATCHER),
    Fault("a batch's failure is nobody's", BATCH, "EngineError(\"a run of the model failed\"), \"failed\")", "EngineError(\"a run of the model failed\"), \"failed\")[:0]", f"{BATCHER} -k raises --timeout=60"),
    Fault("replacements are tried without a pause", "serve/batching/slots.py", "0.0 if losses <= 1 else", "0.0 if losses <= 1000 else", BATCHER),
    Fault("a lone caller's rows are left to one slot", "serve/batching/policy.py", "if queue.callers != 1:", "if True:", BATCHER),
    Fault("what many wait for is shared out as if one did", "serve/batching/policy.py", "if queue.callers != 1:", "if False:", BATCHER),
    Fault("a lone caller's rest waits for company", "serve/batching/policy.py", "and lone.taken:", "and False:", BATCHER),
    Fault("a batch waits however full it is", "serve/batching/policy.py", "if queue.images >= self._max_batch_size:", "if False:", BATCHER),
    Fault("pixels of the next batch overwrite a labelled one's labels", "serve/batching/slot.py", "feeds[\"labels\"].copy()", "feeds[\"labels\"]", "tests/unit/test_batcher.py tests/unit/test_engine.py tests/integration/test_labels.py"),
    # access
    Fault("ModelInfer is open to all", OIP, "pb.ModelInferRequest, self.model_infer, stepped=True)", "pb.ModelInferRequest, self.model_infer, stepped=True, scope=\"open\")", AUTHORISATION),
    Fault("a generating token may load models", "serve/api/model_control.py", "pb.LoadRequest, self.load, scope=\"admin\")", "pb.LoadRequest, self.load)", AUTHORISATION),
    Fault("Triton's unload is open to all", "serve/api/model_control.py", "self.repository_unload, scope=\"admin\")", "self.repository_unload, scope=\"open\")", AUTHORISATION),
    Fault("without tokens anybody administers", CALLERS, "if scope == \"admin\" and not self._open_admin:", "if False:", f"{ACCESS} {AUTHORISATION}"),
    Fault("the server opens administration beyond loopback", SERVER, "*limits, is_loopback(settings.host))", "*limits, True)", WIRING),
    Fault("an expired token is taken", TOKENS, "if token.expires_at <= time.time():", "if False:", f"{ACCESS} {AUTHORISATION}"),
    Fault("a token's scopes are not looked at", CALLERS, "if scope not in token.scopes:", "if False:", f"{ACCESS} {AUTHORISATION}"),
    Fault("a token's secret is not looked at", TOKENS, "if not hmac.compare_digest(hashed, token.sha256 if token else NO_HASH) or token is None:", "if token is None:", f"{ACCESS} {AUTHORISATION}"),
    Fault("a caller's limit is per request", CALLERS, "if self.images + images > self.images_limit:", "if images > self.images_limit:", f"{ACCESS} {OVER_THE_WIRE} -k limit"),
    Fault("a caller's images are never given back", CALLERS, "            self.images -= images\n", "            pass\n", f"{ACCESS} {OVER_THE_WIRE} -k limit"),
    Fault("an IPv4 caller over IPv6 is somebody else", CALLERS, "getattr(address, \"ipv4_mapped\", None) or address", "address", ACCESS),
    Fault("client certificates are not asked for", TLS, "require_client_authentication=self._files.client_ca is not None)", "require_client_authentication=False)", f"{OVER_THE_WIRE} -k certificate"),
    # api
    Fault("gRPC's deadline does not reach the call", RPC, "None if remaining is None else time.monotonic() + remaining", "None", WIRING),
    Fault("the drain's gate is open", ADMISSION, "        if not self._calls.enter():\n", "        if not self._calls.enter() and False:\n", WIRING),
    Fault("a cancelled call is counted as OK", ADMISSION, "self._code = grpc.StatusCode.CANCELLED", "self._code = grpc.StatusCode.OK", WIRING),
    Fault("no hint when to return over gRPC", RPC, "if answer.retry_after_s is not None:", "if False:", WIRING),
    Fault("no hint when to return over HTTP", HTTP, "if refusal.retry_after_s is not None:", "if False:", f"{WIRING} tests/integration/test_http_api.py"),
    Fault("HTTP requests have no deadline", HTTP, "observed, time.monotonic() + TIMEOUT_S)", "observed, None)", WIRING),
    Fault("a full queue is UNAVAILABLE", "serve/api/status.py", "QueueFullError: (Code.RESOURCE_EXHAUSTED, 429)", "QueueFullError: (Code.UNAVAILABLE, 503)", f"tests/unit/test_status.py {WIRING}"),
    Fault("digits over Open Inference are not counted", OIP, "    call.encoded(digits, time.perf_counter() - started)\n", "", WIRING),
    Fault("Open Inference is always ready", OIP, "ready=self._ready()", "ready=True", WIRING),
    Fault("a batch size is chosen though it makes fewer images", "export/batch_size.py", ">= WORTH * best", ">= 0.0 * best", "tests/integration/test_commands.py"),
    Fault("typed values over 127 are cut", "serve/api/encoding.py", "two = flat > 0x7F", "two = flat > 0xFF", "tests/unit/test_encode.py"),
    Fault("a repeated HTTP parameter's last value counts", "serve/api/http.py", "        if name in values:\n", "        if False:\n", "tests/integration/test_http_api.py"),
    Fault("streams are interactive", "serve/api/digits_v1.py", "_addresses(request), Priority.BULK, call)", "_addresses(request), Priority.INTERACTIVE, call)", WIRING),
    # models and runtime
    Fault("a model that fails its golden check goes on", "serve/models/model.py", "if self.breached and not checking:", "if False:", MODEL),
    Fault("a model that is being released takes another call", WAITING, "            if self._closed:\n                return False\n", "", f"{THREADS} {RECONCILE}"),
    Fault("a model is released while it is in use", "serve/models/model.py", "not self.in_use.calls and self.batcher.quiet", "self.batcher.quiet", RECONCILE),
    Fault("a model is released while its batches run", "serve/models/model.py", "not self.in_use.calls and self.batcher.quiet", "not self.in_use.calls", "tests/unit/test_model.py -k released"),
    Fault("a failed ticket is an answer", "serve/models/model.py", "        if ticket.error is not None:\n            raise ticket.error\n", "", MODEL),
    Fault("self-checks go before callers", "serve/models/model.py", "PIXELS, Priority.BULK, None, checking=True)", "PIXELS, Priority.INTERACTIVE, None, checking=True)", WIRING),
    Fault("readiness leaves out the canary", "serve/models/catalog.py", "if served.route.share(version) or version == served.route.default", "if version == served.route.default", f"{WIRING} {RECONCILE}"),
    Fault("one failing look unloads a served model", "serve/models/reconcile.py", "{**before.get(name, {}), **now.get(name, {})}", "now.get(name, {})", RECONCILE),
    Fault("a file's digest is not looked at", "serve/models/repository.py", "if sha256(contents[file]) != digest:", "if False:", "tests/unit/test_bundle_reading.py"),
    Fault("the golden check at loading passes all", "serve/engine/golden.py", "if problem := golden_difference(manifest, expected, got):", "if problem := None:", "tests/unit/test_engine.py tests/unit/test_bundle_reading.py"),
    Fault("connections live for ever", FRONT, "if settings.max_connection_age_s:", "if False:", WIRING),
    Fault("two processes may share the port", FRONT, '("grpc.so_reuseport", 0)', '("grpc.so_reuseport", 1)', FRONTS),
    Fault("a large request is taken", FRONT, '            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),\n', '            ("grpc.max_receive_message_length", -1),\n', FRONTS),
    Fault("what comes while stopping is answered", FRONT, "        if self._stopping:\n", "        if False:\n", FRONTS),
    Fault("what comes while stopping is cut off", FRONT, "        await self._handling.wait(deadline)\n", "", FRONTS),
    Fault("stopping waits for ever", FRONT, "            self._server.cancel_all_calls()\n", "", FRONTS),
    Fault("who has left is computed for", HANDLING, "    def leave(self, key: Hashable) -> None:\n", "    def leave(self, key: Hashable) -> None:\n        return\n", FRONTS),
    Fault("who has left is computed for, without an event loop", HANDLING, "        if isinstance(self._at_work.get(key), Steps):\n            self._leave(key)\n", "        if isinstance(self._at_work.get(key), Steps):\n            pass\n", FRONTS),
    Fault("without an event loop a call is given up after its end", BATCH, "            if ticket.dead or ticket.done == ticket.span.count:\n                return False\n", "            if ticket.dead or ticket.done == ticket.span.count:\n                return True\n", BATCHER),
    Fault("a refused piece of work is never told of", WAITING, "                error = refused\n", "                return\n", THE_WAITING),
    Fault("calls share a context", WAITING, "_stepping().copy()", "_stepping()", THE_WAITING),
    Fault("what ends after its waiter has left breaks", WAITING, "    if not waiter.done():", "    if True:", THE_WAITING),
    Fault("the first failure ends what was put off", WAITING, "                except Exception:  # the others", "                except ZeroDivisionError:  # the others", THE_WAITING),
    Fault("a caller's images are counted by two threads at once", CALLERS, "            with self.lock:\n                self.images -= images\n", "            left = self.images\n            time.sleep(0)\n            self.images = left - images\n", THREADS),
    Fault("two threads make two accounts of one caller", CALLERS, "        with self._lock:\n            account = self._known.get(name)\n", "        if True:\n            account = self._known.get(name)\n            time.sleep(0)\n", THREADS),
    Fault("a route is seen half changed", "serve/models/catalog.py", "        versions, route = served.versions, served.route\n", "        versions = served.versions\n        route = self._served[name].route\n", THREADS),
    Fault("a handler's error leaves its caller waiting", HANDLING, '            call.end(grpc.StatusCode.INTERNAL, "the call could not be answered")\n', "            pass\n", FRONTS),
    Fault("a call without a request waits for ever", FRONT, '            call.end(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")\n', "            pass\n", FRONTS),
    Fault("an unknown method waits for ever", FRONT, '            call.end(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}")\n', "            pass\n", FRONTS),
    Fault("nobody looks whether callers have left", FRONT, "        for call in self._handling.at_work:\n            call.watch()\n", "", FRONTS),
    Fault("a stream runs ahead of its reader", CALL, "        await self._done(self._sending(self._core.SendMessageOperation(message, FLAGS)))\n", "        self._call.start_server_batch(self._sending(self._core.SendMessageOperation(message, FLAGS)), _nothing)\n", FRONTS),
    Fault("a call that is watched is watched again at its end", CALL, "            return not watched\n", "            return True\n", FRONTS),
    Fault("a status loses its metadata", CALL, "(trailing or self.trailing, code.value[0]", "(self.trailing, code.value[0]", f"{FRONTS} {WIRING}"),
    Fault("a stopping server refuses nobody", SERVER, "        await self._in_flight.close(settings.drain_deadline_s)\n", "", WIRING),
    Fault("a stopping server says that it is ready", SERVER, "        self._health.draining = True\n", "", WIRING),
    Fault("liveness never fails", "serve/runtime/health.py", "without_slots_s > WITHOUT_SLOTS_S:", "without_slots_s > 1e9:", RUNTIME),
    Fault("a background task dies of its first error", "serve/background.py", "        except Exception:\n", "        except ZeroDivisionError:\n", RUNTIME),
    # observability
    Fault("padding is not counted", METRICS, "padding(sum(buckets) - sum(images))", "padding(0)", WIRING),
    Fault("dropped rows are counted as one", METRICS, "self._dropped(reason).inc(images)", "self._dropped(reason).inc()", WIRING),
    Fault("digits are counted as requests", METRICS, "images_in(encoding)(images)", "images_in(encoding)(1)", WIRING),
    Fault("a gauge keeps a released model", METRICS, "            gauge.labels(model, str(version)).set_function(float)  # the function it had holds the model\n", "", MODEL),
    Fault("what was kept is not observed when metrics are read", METRICS, "            records.flush()\n", "            pass\n", WIRING),
    # CUDA
    Fault("the kernel takes the block before", "serve/engine/latents.cu", "low = base + block + 1;", "low = base + block;", DEVICE_LATENTS),
    Fault("the kernel forgets the counter's carry", "serve/engine/latents.cu", " + (low < base);", ";", DEVICE_LATENTS),
    Fault("the kernel draws over a label that was asked for", "serve/engine/latents.cu", "own.label < 0 ?", "own.label < 1ll << 62 ?", DEVICE_LATENTS),
    Fault("the kernel truncates nothing", "serve/engine/latents.cu", "if (tail != 0.0f) {", "if (tail < 0.0f) {", DEVICE_LATENTS),
    Fault("the trap among cuDNN's searches is offered", "serve/settings.py", '("EXHAUSTIVE", "HEURISTIC")', '("EXHAUSTIVE", "HEURISTIC", "DEFAULT")', "tests/unit/test_settings.py"),
    Fault("the device is not told which label is wanted", "serve/engine/device_latents.py", "OF_THE_STREAM if span.labels is None else span.labels", "OF_THE_STREAM", DEVICE_LATENTS),
    Fault("latents on the device are believed untried", "serve/engine/cuda_engine.py", "problem = self._drawing_problem(drawing, LatentReader(*shape))", "problem = None", DEVICE_LATENTS),
    Fault("a thread keeps the capture mode that forbids what it does", "serve/engine/cuda.py", '    if of != "nvrtc" and not hasattr(_this_thread, "minds_own_captures"):\n', "    if False:\n", "tests/unit/test_cuda_calls.py"),
    Fault("a caller's own latents are drawn over", "serve/engine/cuda_engine.py", "if self._drawing is None or any(span.explicit is not None for span in spans):", "if self._drawing is None:", DEVICE_LATENTS),
    Fault("the labels that the device drew are not fetched", "serve/engine/cuda_engine.py", "            self._buffers.fetch(\"labels\", rows)\n", "            pass\n", DEVICE_LATENTS),
    Fault("inputs are not copied to the device", "serve/engine/device_buffers.py", "            self.device.copy_to_device(self.address(name), array.ctypes.data, rows * array.strides[0], self.stream)\n", "            del array\n", ENGINE),
    # data sets
    Fault("a filter keeps what it was to refuse", "serve/dataset/filter.py", "good = (judge.confidence(made, labels) >= dataset.filter)", "good = (judge.confidence(made, labels) < 2)", DATASET),
    Fault("what a filter refuses depends on the shard", "serve/dataset/shards.py", "else TASK", "else BATCH", DATASET),
    Fault("a filter forgets whose label is in turn", "serve/dataset/header.py", "[given % len(self.labels)]", "[indices % len(self.labels)]", DATASET),
    Fault("a filtered digit's index is the one that it was refused at", "serve/dataset/filter.py", "made[: len(others)][good], others[good]", "made[: len(others)][good], given[good]", DATASET),
    Fault("a value on a bucket's bound is counted above it", "serve/observability/histogram.py", "searchsorted(values)", "searchsorted(values, \"right\")", "tests/unit/test_histogram.py"),
    # train
    Fault("real and fake are swapped", STEP, "discriminator_loss(real_logits.float(), fake_logits.float(),", "discriminator_loss(fake_logits.float(), real_logits.float(),", REFERENCE),
    Fault("fakes are judged with the real images' labels", STEP, "self.trained_discriminator(fake, *labels)", "self.trained_discriminator(fake, *real[1:])", REFERENCE),
    Fault("the discriminator's gradients pile up", STEP, "        self.discriminator_optimizer.zero_grad()\n        discriminator_loss.backward()\n        self.discriminator_optimizer.step()\n\n        noise", "        discriminator_loss.backward()\n        self.discriminator_optimizer.step()\n\n        noise", REFERENCE),
    Fault("the generator's gradients pile up", STEP, "        self.generator_optimizer.zero_grad()\n        # Only", "        # Only", REFERENCE),
    Fault("the first layer's maps are turned", "train/models.py", "self.weight.permute(0, 2, 3, 1)", "self.weight.permute(0, 3, 2, 1)", "tests/unit/test_train_networks.py"),
    Fault("a status has a text of any length", "serve/api/status.py", "if len(text) <= MOST_CHARACTERS else", "if text else", "tests/unit/test_status.py"),
    Fault("a picture has headers of any length", "serve/api/http.py", " and digits.count <= LABELS_IN_HEADER", "", "tests/integration/test_http_api.py -k headers"),
    Fault("PyTorch writes checkpoints to the disk itself", "train/checkpoint.py", "stream.write(content.getbuffer())", "write(stream)", f"{TRAIN} -k fit"),
    Fault("what was half-written stays", "serve/files.py", "                each.unlink()", "                pass", "tests/integration/test_dataset.py -k full_disk"),
    Fault("joined files are written in their places", "serve/files.py", "path.with_name(f\".{path.name}-{secrets.token_hex(8)}\")", "path", "tests/integration/test_dataset.py -k full_disk"),
    Fault("two may rewrite a file at the same time", "serve/files.py", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)", "tests/unit/test_access.py tests/unit/test_reconcile.py -k same_time"),
    Fault("a token is added beside others' adding", TOKENS, "        with locked(flags.file.parent):\n            _change(flags)", "        _change(flags)", "tests/unit/test_access.py -k same_time"),
    Fault("a replica undoes another's change", "serve/models/serving_file.py", "            with locked(self.path.parent):", "            if True:", "tests/unit/test_reconcile.py -k same_time"),
    Fault("a reader who has left is complained of", "serve/command_line.py", "        drop_output()\n        status", "        status", "tests/integration/test_commands.py -k reader"),
    Fault("a flag's number has no bounds", "serve/command_line.py", "if not low <= value <= high:", "if False:", "tests/integration/test_commands.py -k bounds"),
    Fault("a server stops when nobody reads what it prints", "serve/cli.py", "            drop_output()", "            raise", "tests/integration/test_commands.py -k nobody_reads"),
    Fault("a lock is waited for without end", "serve/files.py", "time.monotonic() > deadline", "False", "tests/unit/test_access.py -k locked"),
    Fault("Ctrl-C is complained of", "serve/command_line.py", "    except KeyboardInterrupt:\n        status = ENDED_BY_SIGNAL + signal.SIGINT\n", "", "tests/integration/test_dataset.py -k signal"),
    Fault("two containers write into one file", "serve/files.py", "{secrets.token_hex(8)}", "{os.getpid()}", "tests/integration/test_dataset.py -k same_number"),
    Fault("the loop is left in evaluation mode", LOOP, "        shown.train()\n", "", REFERENCE),
    Fault("the average is upside down", LOOP, "(self.averages, self.followed, None)", "(self.followed, self.averages, None)", REFERENCE),
    Fault("every epoch has the same order", LOOP, "self.config.seed * 1_000_003 + epoch)", "self.config.seed * 1_000_003)", REFERENCE),
    Fault("the generator wants to be found out", "train/trainer/losses.py", "torch.ones_like(fake_logits))", "torch.zeros_like(fake_logits))", REFERENCE),
    Fault("the mean of the losses is their sum", "train/trainer/losses.py", "return total / 2 if joined_by == \"mean\" else total", "return total", REFERENCE),
    Fault("the learning rate does not decay", LOOP, "                self.update.decay(self.step / self.total_steps)\n", "", f"{TRAIN} -k decays"),
    Fault("a resumed run draws the first noise again", STEP, "        self.noise.set_state(state[\"noise\"])\n", "", f"{TRAIN} -k signal"),
    Fault("a signal saves nothing", LOOP, "if due or last or stopping:", "if due or last:", f"{TRAIN} -k signal"),
    Fault("the last step is not saved", LOOP, "if due or last or stopping:", "if due or stopping:", f"{TRAIN} -k last_step"),
    Fault("pairs are compared the wrong way round", STEP, "losses.relativistic_loss(fake_logits - real_logits)", "losses.relativistic_loss(real_logits - fake_logits)", REFERENCE),
    Fault("the generator's gradient is not weighed by its own loss", STEP, "ratio = -(real_logits - fake_logits).detach()", "ratio = -(fake_logits - real_logits).detach()", REFERENCE),
    Fault("a fake is paired with another label", STEP, "fake = self.trained_generator(noise, labels)\n        seen", "fake = self.trained_generator(noise, labels.flip(0))\n        seen", REFERENCE),
    Fault("the label loss reads fakes", STEP, "cross_entropy(logits[: len(images)], labels)", "cross_entropy(logits[len(images) :], labels)", REFERENCE),
    Fault("fakes are never moved", STEP, "moved = torch.rand((total, 2, 1), generator=self.noise, device=self.device) < SHIFTED_SHARE", "moved = torch.rand((total, 2, 1), generator=self.noise, device=self.device) * torch.tensor([[[1.0], [9.0]]]) < SHIFTED_SHARE", REFERENCE),
    Fault("everything is moved", STEP, "SHIFTED_SHARE = 0.5", "SHIFTED_SHARE = 1.0", REFERENCE),
    Fault("the label loss does not decay", STEP, "_decayed(config.label_loss, config.label_loss_end, done)", "config.label_loss", REFERENCE),
    Fault("closing an engine fails with a lost device", "serve/engine/device_buffers.py", "            with suppress(EngineError):\n                self.device.unlock_pages", "            if True:\n                self.device.unlock_pages", ENGINE),
    Fault("a missing library of CUDA's is no refusal", "serve/engine/provider.py", "        load_libraries()\n", "", "tests/unit/test_cuda_calls.py"),
    Fault("the label loss weighs nothing", STEP, "labels) * self.label_weight", "labels) * 0", REFERENCE),
    Fault("real digits are judged with other shares of the labels", "train/evaluation/evaluate.py", "order[labels[order] == label][:count] for label", "order[labels[order] == 9 - label][:count] for label", "tests/unit/test_quality.py"),
    Fault("the penalty is as light as if it came every step", STEP, "self.config.gradient_penalty * self.config.penalty_every", "self.config.gradient_penalty", REFERENCE),
    Fault("the penalty looks at real images alone", STEP, "points = torch.cat((images, fake)).requires_grad_()", "points = torch.cat((images, images)).requires_grad_()", REFERENCE),
    Fault("a gradient in another memory layout", STEP, "torch.empty_like(parameter).copy_(self.ranks.mean(gradient))", "self.ranks.mean(gradient)", REFERENCE),
    Fault("the second judge is the first", "train/evaluation/evaluate.py", "self._compared(self._second, self._second.read(samples), labels)", "self._compared(self._judge, read, labels)", "tests/unit/test_quality.py"),
    Fault("every classifier has the same seed", "train/evaluation/evaluate.py", "train_judge(pixels, labels, device, epochs, seed,", "train_judge(pixels, labels, device, epochs, 0,", "tests/unit/test_quality.py"),
    Fault("the best digits are drawn as the worst", "train/evaluation/evaluate.py", "order[:SHOWN]), (\"best.png\", order.flip(0)[:SHOWN])", "order.flip(0)[:SHOWN]), (\"best.png\", order[:SHOWN])", "tests/unit/test_quality.py"),
    # export
    Fault("a label's gain is added", GENERATOR, "self.convolution(maps) * gain + bias", "self.convolution(maps) + gain + bias", EXPORT),
    Fault("pixels are cut, not rounded", GENERATOR, "torch.round(images * 255.0)", "torch.floor(images * 255.0)", EXPORT),
    Fault("the trained range's offset is turned round", GENERATOR, "self.offset = -low /", "self.offset = low /", EXPORT),
    Fault("a NaN passes for parity", PARITY, "if not images.max() <= tolerance.images:", "if images.max() > tolerance.images:", EXPORT),
    Fault("images may differ by twice the tolerance", PARITY, "if not images.max() <= tolerance.images:", "if not images.max() <= 2 * tolerance.images:", EXPORT),
    Fault("pixels may differ by one level more", PARITY, "if levels.max() > tolerance.pixel_levels:", "if levels.max() > tolerance.pixel_levels + 1:", EXPORT),
    Fault("the generator is exported, not its average", "train/models.py", "\"average\" if config.average_decay else \"generator\"", "\"generator\"", EXPORT),
    Fault("a checkpoint older than its run is exported", "train/checkpoint.py", "if state[\"step\"] != last:", "if False:", EXPORT),
    Fault("a quality of another step is published", BUNDLE, "if step != checkpoint[\"step\"]:", "if False:", EXPORT),
    Fault("a floor is a ceiling", BUNDLE, "(value >= floor if", "(value <= floor if", EXPORT),
    # readiness, load reports, log points
    Fault("ready only with every model", "serve/runtime/health.py", "if any(self._catalog.ready(name) for name in names):", "if all(self._catalog.ready(name) for name in names):", RUNTIME),
    Fault("one model's readiness is any's", "serve/runtime/health.py", "self._catalog.names() if model is None else [model]", "self._catalog.names()", RUNTIME),
    Fault("a refusal while draining counts as a fault", ADMISSION, "if isinstance(error, DrainingError):", "if False:", WIRING),
    Fault("load reports are sent to everybody", RPC, "if self._admission.load_reports is not None:", "if True:", LOADS),
    Fault("a load report has its fields swapped", "serve/ports/load_report.py", "bytes([6 << 3 | 1]), bytes([9 << 3 | 1])", "bytes([9 << 3 | 1]), bytes([6 << 3 | 1])", LOADS),
    Fault("a busy process reports that it is idle", "serve/ports/load_report.py", "max(0.0, load.busy_s - self._busy_s)", "max(0.0, self._busy_s - load.busy_s)", LOADS),
    Fault("a kernel without IPv6 is asked for it", "serve/ports/http_connections.py", "and not socket.has_dualstack_ipv6()", "and False", "tests/integration/test_serve_start.py -k ipv6"),
    Fault("log points are counted through the run alone", LOOP, "return self.step % self.steps_per_epoch % self.config.report_every == 0", "return self.step % self.config.report_every == 0", REFERENCE),
    Fault("a mean's window is one batch too long", LOOP, "self.log_points[-1][0] if self.log_points else -1", "self.log_points[-1][0] if self.log_points else 0", REFERENCE),
    Fault("the last save is not in a run's time", LOOP, "        self._count_time()  # the last save took some as well\n", "", "tests/integration/test_runs.py -k stopped"),
    Fault("a URL has as little room as aiohttp gives it", "serve/ports/http_connections.py", "LONGEST_LINE = 32 * 1024", "LONGEST_LINE = 8190", "tests/integration/test_http_api.py -k largest"),
    # CUDA, by its stand-ins
    Fault("a lost device leaves its model ready", "serve/models/model.py", " and self.batcher.device_lost is None", "", WIRING),
    Fault("a lost device's process goes on", SERVER, "if model.batcher.device_lost and not self.device_lost:", "if False:", WIRING),
    Fault("a CUDA failure is one run's affair", "serve/engine/cuda_engine.py", "if CUDA_FAILURE.search(str(error)):", "if False:", ENGINE),
    Fault("answers are read before they are there", "serve/engine/device_buffers.py", "        self.device.wait(self.stream)\n", "", ENGINE),
    Fault("the last slot is lent too", "serve/engine/device_buffers.py", "if self._free and rows * slot.strides[0] >= LENT_BYTES:", "if rows * slot.strides[0] >= LENT_BYTES:", ENGINE),
    Fault("a slot comes back while it is read", "serve/engine/device_buffers.py", "            return lent[:rows]\n", "            self._free.append(slot)\n            return lent[:rows]\n", ENGINE),
    Fault("runs are not waited for though they are wrong", "serve/engine/cuda_engine.py", "if problem := self._problem(samples) or self._problem(samples):", "if problem := None:", ENGINE),
    Fault("an old driver is taken", "serve/engine/driver.py", "version.value < LEAST_VERSION", "version.value < 0", "tests/integration/test_cuda_start.py"),
    Fault("a container's quota is not looked at in training", "train/device.py", "min(torch.get_num_threads(), usable_cores())", "torch.get_num_threads()", "tests/unit/test_train_device.py"),
    Fault("bf16 is taken where it is imitated", STEP, "and has_bf16(self.device)", "and True", "tests/unit/test_train_step.py"),
    Fault("a GPU that imitates bf16 has it", "train/device.py", "including_emulation=False", "including_emulation=True", "tests/unit/test_train_device.py"),
    Fault("a resumed run captures as it was begun", STEP, "update(capturable=self.capturable, lr=self.rate)", "update()", "tests/unit/test_train_step.py"),
]  # fmt: skip
