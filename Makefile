# `make demo` and `make test` are all a newcomer needs: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-all test-processes test-oldest test-newest test-clients test-ray test-faults fuzz lint format clean

setup: $(STAMP)

# torch first and pinned: where a build for CPUs alone is at hand, pip then takes that; others pull gigabytes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/zipper demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto

test-all: setup
	$(BIN)/python -m pytest -n auto -m ""

# Two and four processes train, evaluate and go on as one. TESTS: only these.
test-processes: setup
	$(BIN)/python -m pytest -m slow $(or $(TESTS),tests/training/test_sharding.py tests/training/test_order.py tests/jobs/test_fuse_in_processes.py)

# The oldest versions that pyproject.toml allows but for torch, in a folder of their own; Python 3.11 or 3.12.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[demo,dev]"
	$(VENV)-oldest/bin/python -m pytest -n auto

# The newest versions that pyproject.toml allows today but for torch, in a folder of their own. TESTS: only these.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		"$$(grep ^torch== constraints.txt)" --editable ".[demo,dev]"
	$(VENV)-newest/bin/python -m pytest -n auto $(TESTS)

# The services of other projects that speak to our routes, against a server here, in a folder of their own.
test-clients:
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-clients/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-clients/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(VENV)-clients/bin/python -m pip install --quiet --editable ".[clients]"
	$(VENV)-clients/bin/python -m pytest tests/serve/test_openai_client.py tests/serve/test_pipecat.py tests/serve/test_livekit.py

# Two replicas by Ray Serve, and a cluster of two workers that prepares data, on this machine, in a folder of its own.
test-ray:
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-ray/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-ray/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,ray]"
	$(VENV)-ray/bin/python -m pytest -m "" tests/serve/test_ray.py tests/jobs/test_ray_engine.py

# Faults put into runs of small models: kills, full disks, signals, lost processes. The last line is the figure, as JSON.
# At most 20 minutes on two cores. What is written goes to memory where there is some for that, not to be held up by a disk.
FAULTS := $(if $(wildcard /dev/shm),/dev/shm,/tmp)/zipper-faults
test-faults: setup
	FAULTS_RECORD=$(CURDIR)/.faults.json $(BIN)/python -m pytest -n auto -m "" tests/faults --basetemp $(FAULTS); \
		status=$$?; rm -rf $(FAULTS); cat .faults.json && rm .faults.json; exit $$status

# A hundred thousand inputs that nobody should send, led by coverage where atheris is installed. INPUTS, SEED.
fuzz: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[fuzz]"
	$(BIN)/python tests/fuzz/run.py --inputs $(or $(INPUTS),100000) --seed $(or $(SEED),0)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-clients $(VENV)-ray build dist src/*.egg-info
