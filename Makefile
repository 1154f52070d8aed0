# Everything one does with this project. `make help` lists it. Nothing here is needed to run it: python3 centralized_simulation.py --workers 5
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' sllm/__init__.py)
REVISION := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
TAG ?= latest
REGISTRY ?=
IMAGE_PREFIX := $(if $(REGISTRY),$(REGISTRY)/,)
ROLES := coordinator worker
BASE_IMAGE ?= python:3.11-slim
COMPILE ?=
BUILD_ARGS := --build-arg BASE_IMAGE=$(BASE_IMAGE) $(if $(COMPILE),--build-arg COMPILE=$(COMPILE)) $(if $(BUILD_IMAGE),--build-arg BUILD_IMAGE=$(BUILD_IMAGE)) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION)
PLATFORMS ?= linux/amd64,linux/arm64

COMPOSE ?= $(if $(shell docker compose version 2>/dev/null),docker compose,docker-compose)
KIND_CLUSTER ?= kind
NAMESPACE ?= sllm-system
OVERLAY ?=
REPLICAS ?=
BUILD_IMAGE ?=

WORKERS ?= 5
DURATION ?= 30
SEEDS ?= 200
MEASURED ?=
ARGS ?=

# $(call need,TOOL,HINT): stop with one line when a tool is missing.
need = command -v $(1) >/dev/null || { echo "make $@: $(1) is missing: $(2)" >&2; exit 1; }
need_docker = $(call need,docker,install a Docker engine with Compose v2); docker info >/dev/null 2>&1 || { echo "make $@: the Docker engine does not answer: is it running?" >&2; exit 1; }
need_compose = $(need_docker); $(COMPOSE) version >/dev/null 2>&1 || { echo "make $@: Compose is missing: install Docker's plugin compose, or docker-compose" >&2; exit 1; }
need_kubectl = $(call need,kubectl,install it and choose a cluster: kubectl config use-context)
need_cluster = $(need_kubectl); kubectl get --raw /readyz >/dev/null 2>&1 || { echo "make $@: no cluster answers kubectl: choose one with KUBECONFIG or kubectl config use-context" >&2; exit 1; }
need_replicas = [[ "$(REPLICAS)" =~ ^[0-9]+$$ ]] || { echo "make $@: say how many workers: make $@ REPLICAS=10" >&2; exit 2; }
need_file = [ -e $(1) ] || { echo "make $@: $(1) is missing from this checkout" >&2; exit 1; }

# Why pods have no node yet; nothing when all have one. A cluster that makes nodes on demand needs minutes for it, so this is no failure yet.
PENDING := {range .items[*]}{.metadata.name}: {.status.conditions[?(@.type=="PodScheduled")].message}{"\n"}{end}
say_pending = kubectl -n $(NAMESPACE) get pods --field-selector=status.phase=Pending -o 'jsonpath=$(PENDING)' | sed -n 's/\(.*\): \(.*nodes.*\)/make $@: \1 waits for a node: \2/p' >&2

# The last word of each container of the Compose fleet that should be running and is not, or is and is not healthy. One that was never started has none.
say_unhealthy = for id in $$($(COMPOSE) ps --all --quiet); do \
	  said=$$(docker logs --tail 1 $$id 2>&1 | sed 's/[\\&/]/\\&/g'); [ -n "$$said" ] || continue; \
	  docker inspect --format '{{slice .Name 1}}: {{.State.Status}} {{with .State.Health}}{{.Status}}{{else}}{{$$.State.ExitCode}}{{end}}' $$id \
	  | grep -v -e ': running healthy$$' -e ': exited 0$$' | sed "s/^/make $@: /; s/$$/; it said last: $$said/" >&2 || true; done

##@ Run
.PHONY: run
run: ## a fleet on this machine: make run WORKERS=5 DURATION=30 ARGS="--virtual"
	@$(call need,$(PYTHON),install Python 3.11)
	$(PYTHON) centralized_simulation.py --workers $(WORKERS) --duration $(DURATION) $(ARGS)

.PHONY: compare
compare: ## policies under the same requests, with intervals: make compare ARGS="--workers 20 --rates 10,20 --html compare.html"
	@$(call need_file,experiments/compare.py)
	$(PYTHON) experiments/compare.py $(ARGS)

.PHONY: saturation
saturation: ## the largest rate that a fleet can serve: make saturation WORKERS=5
	@$(call need_file,experiments/saturation.py)
	$(PYTHON) experiments/saturation.py --workers $(WORKERS) $(ARGS)

.PHONY: simulate
simulate: ## random fleets with random faults and every checker on: make simulate SEEDS=200
	@$(call need_file,experiments/simulate.py)
	$(PYTHON) experiments/simulate.py --seeds $(SEEDS) $(ARGS)

.PHONY: validate
validate: ## hold the simulator against queueing theory
	@$(call need_file,experiments/validate.py)
	$(PYTHON) experiments/validate.py $(ARGS)

.PHONY: engines
engines: ## hold step and load times against published measurements: make engines MEASURED=folder of serving.csv and loading.csv
	@[ -n "$(MEASURED)" ] || { echo "make $@: say where serving.csv and loading.csv are: MEASURED=folder" >&2; exit 1; }
	$(PYTHON) experiments/engines.py $(MEASURED) $(ARGS)

.PHONY: parity
parity: ## the same run live and in virtual time, side by side
	@$(call need_file,experiments/parity.py)
	$(PYTHON) experiments/parity.py $(ARGS)

.PHONY: bench
bench: $(READY) ## every benchmark of bench/, one after the other
	@$(call need_file,bench)
	@missed=0; for file in bench/[!_]*.py; do echo "== $$file"; $(BIN)/python $$file || missed=1; done; exit $$missed

.PHONY: bench-check
bench-check: $(READY) ## the budgets of bench/ that are ratios, with a factor of two: about a minute
	$(BIN)/python bench/_check.py $(ARGS)

##@ Develop
$(READY): requirements-dev.txt requirements-fast.txt
	@$(call need,$(PYTHON),install Python 3.11)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	@touch $@

.PHONY: venv
venv: $(READY) ## make .venv with the pinned development tools

.PHONY: test
test: $(READY) ## all tests that need neither a Docker engine nor a cluster: make test ARGS="-k fleet"
	$(BIN)/python -m pytest $(ARGS)

.PHONY: check
check: $(READY) ## linter and types: ruff, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy .

.PHONY: fast
fast: $(READY) ## compile the modules that every message runs through, in place: the same results in about a third of the time; needs a C compiler
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "make $@: there is no C compiler: install gcc and the headers of Python (python3-dev)" >&2; exit 1; }
	@$(BIN)/python tools/compile.py

.PHONY: slow
slow: ## remove what make fast compiled
	@$(call need,$(PYTHON),install Python 3.11)
	@$(PYTHON) tools/compile.py --remove

.PHONY: clean
clean: slow ## remove what the tools left behind, .venv too
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

##@ Docker
.PHONY: build-docker
build-docker: ## both images: make build-docker TAG=0.1.0 REGISTRY=registry.example.com/sllm
	@$(need_docker)
	@for role in $(ROLES); do echo "== $(IMAGE_PREFIX)sllm-$$role:$(TAG)"; docker build --quiet $(BUILD_ARGS) -f Dockerfile.$$role -t $(IMAGE_PREFIX)sllm-$$role:$(TAG) .; done

.PHONY: build-multiarch
build-multiarch: ## both images for amd64 and arm64, pushed: make build-multiarch REGISTRY=registry.example.com/sllm TAG=0.1.0
	@$(need_docker); docker buildx version >/dev/null 2>&1 || { echo "make $@: docker buildx is missing: install Docker's plugin buildx" >&2; exit 1; }
	@[ -n "$(REGISTRY)" ] || { echo "make $@: say where to push: REGISTRY=registry.example.com/sllm" >&2; exit 1; }
	@for role in $(ROLES); do docker buildx build --platform $(PLATFORMS) $(BUILD_ARGS) -f Dockerfile.$$role -t $(IMAGE_PREFIX)sllm-$$role:$(TAG) --push .; done

.PHONY: run-docker
run-docker: ## coordinator and three workers with Compose; the live page is at http://127.0.0.1:8080/
	@$(need_compose)
	@$(COMPOSE) up --build --detach --wait --wait-timeout 120 central-coordinator worker || { $(say_unhealthy); exit 1; }

.PHONY: scale-docker
scale-docker: ## change the number of workers: make scale-docker REPLICAS=10
	@$(need_replicas)
	@$(need_compose)
	@$(COMPOSE) up --detach --no-recreate --no-deps --wait --wait-timeout 120 --scale worker=$(REPLICAS) worker || { $(say_unhealthy); exit 1; }

.PHONY: load-docker
load-docker: ## load for the Compose fleet: make load-docker RATE=5 DURATION=30, and any other variable of a client
	@$(need_compose)
	DURATION=$(DURATION) $(COMPOSE) run --rm --no-deps -T load-generator

.PHONY: logs
logs: ## follow the logs of the Compose fleet
	@$(need_compose)
	$(COMPOSE) logs --follow

.PHONY: stop-docker
stop-docker: ## stop the Compose fleet and remove it, its key too
	@$(need_compose)
	$(COMPOSE) --profile load down --volumes

.PHONY: quick-docker
quick-docker: run-docker load-docker ## up, some load, and what came of it
	@$(COMPOSE) ps

.PHONY: test-docker
test-docker: $(READY) ## end-to-end tests on the Docker engine
	@$(need_compose)
	$(BIN)/python -m pytest tests/e2e -m docker $(ARGS)

##@ Kubernetes
.PHONY: load-kind
load-kind: ## build the images and bring them into kind: make load-kind KIND_CLUSTER=kind
	@$(call need,kind,install kind (https://kind.sigs.k8s.io))
	@$(MAKE) build-docker
	@for role in $(ROLES); do kind load docker-image $(IMAGE_PREFIX)sllm-$$role:$(TAG) --name $(KIND_CLUSTER); done

.PHONY: k8s-base
k8s-base: ## write k8s/base/all.yaml, which the overlays stand on, from the manifests of k8s/
	@{ echo "# Written by make k8s-base from the files of k8s/: change those."; cat k8s/*.yaml; } > k8s/base/all.yaml

# The manifests name one namespace, and name it nowhere else than where it is meant: another one is put in its place on the way.
in_namespace = sed 's/sllm-system/$(NAMESPACE)/g' | kubectl apply -f -
.PHONY: deploy-k8s
deploy-k8s: ## apply the manifests: make deploy-k8s [OVERLAY=dev|production] [NAMESPACE=sllm-system]
	@$(need_cluster)
ifeq ($(OVERLAY),)
	@cat k8s/*.yaml | $(in_namespace)
	@if kubectl api-versions | grep -qx policy/v1; then cat k8s/disruption-budgets/*.yaml | $(in_namespace); else echo "this cluster is older than 1.21: no disruption budgets"; fi
else
	@$(call need_file,k8s/overlays/$(OVERLAY))
	@kubectl kustomize k8s/overlays/$(OVERLAY) | $(in_namespace)
endif
	kubectl -n $(NAMESPACE) rollout status deployment/central-coordinator --timeout=180s
	kubectl -n $(NAMESPACE) rollout status statefulset/worker --timeout=300s

.PHONY: undeploy-k8s
undeploy-k8s: ## remove everything, the namespace and its key too
	@$(need_cluster)
	kubectl delete namespace $(NAMESPACE) --ignore-not-found --timeout=180s

.PHONY: scale-workers
scale-workers: ## change the number of workers: make scale-workers REPLICAS=10
	@$(need_replicas)
	@$(need_cluster)
	kubectl -n $(NAMESPACE) scale statefulset/worker --replicas=$(REPLICAS)
	@kubectl -n $(NAMESPACE) rollout status statefulset/worker --timeout=60s || { $(say_pending); kubectl -n $(NAMESPACE) rollout status statefulset/worker --timeout=540s; }

# Asked from inside its pod: where network policies are enforced, the API server's proxy does not get there from another node.
ASK_STATE := import json, urllib.request as r; s = json.load(r.urlopen("http://127.0.0.1:8080/state?limit=0")); print("coordinator:", s["reason"], s["summary"])
.PHONY: status-k8s
status-k8s: ## what runs, and what the coordinator says of the fleet
	@$(need_cluster)
	@kubectl -n $(NAMESPACE) get deployment,statefulset,pod -o wide
	@kubectl -n $(NAMESPACE) exec deployment/central-coordinator -- python3 -c '$(ASK_STATE)'

# What a load generator goes by, where it is given on make's command line or in the environment; the rest says the ConfigMap.
LOAD_VARIABLES := ARRIVALS CONCURRENCY COORDINATOR_SILENT CV DEMO_MODELS DRAIN_TIMEOUT DURATION ENGINE ENGINE_PROFILE HARDWARE HTTP_HOSTS LENGTHS LOADER LOG_FORMAT \
  LOG_LEVEL MIX MODELS MODEL_CATALOG MODEL_MAP PLACEMENTS_MAX POLL_INTERVAL PRIORITIES RATE REQUESTS_CSV REQUEST_TIMEOUT RETRY_INITIAL RETRY_MAX \
  SEED SERVICE_MEAN SESSIONS SLOTS STAGES THINK TRACE TRACE_COLUMNS TRACE_RATE WORKERS WORKER_TRIES ZIPF
load_settings = DURATION=$(DURATION) $(foreach name,$(LOAD_VARIABLES),$(if $(filter command environment,$(firstword $(origin $(name)))),'$(name)=$($(name))'))
# "Complete", or "Failed: " and why.
JOB_ENDED := {range .status.conditions[?(@.type=="Complete")]}{.type}{end}{range .status.conditions[?(@.type=="Failed")]}{.type}: {.message}{end}
.PHONY: load-k8s
load-k8s: ## load on the cluster, and what came of it: make load-k8s RATE=5 DURATION=30, and any other variable of a client
	@$(need_cluster)
	kubectl -n $(NAMESPACE) delete job load-generator --ignore-not-found
	@kubectl set env --local -f k8s/examples/load-generator.yaml -o yaml $(load_settings) | $(in_namespace)
	@seconds=$(DURATION); limit_s=$$(( $${seconds%.*} + 180 )); ended=; \
	while [ -z "$$ended" ] && [ $$SECONDS -lt $$limit_s ]; do sleep 1; ended=$$(kubectl -n $(NAMESPACE) get job load-generator -o 'jsonpath=$(JOB_ENDED)'); done; \
	kubectl -n $(NAMESPACE) logs job/load-generator --tail=1 || true; \
	case "$$ended" in *Complete*) ;; *) echo "make $@: the load generator's job $${ended:-did not end within $$limit_s s}" >&2; exit 1;; esac

.PHONY: quick-k8s
quick-k8s: deploy-k8s load-k8s status-k8s ## deploy, some load, and what came of it; build or load the images first

.PHONY: test-k8s
test-k8s: $(READY) ## end-to-end tests on kubectl's current cluster; its nodes must see this machine's images
	@$(need_docker); $(need_cluster)
	$(BIN)/python -m pytest tests/e2e -m k8s $(ARGS)

##@ Help
.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
