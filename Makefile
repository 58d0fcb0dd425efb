# The developers' front door. What a target does stands beside it, how in scripts/.
.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format docs asan tsan mutants fuzz sim soak conformance build package \
	clean setup

FUZZ_SECONDS ?= 600
SIM_SEEDS ?= 2000
MINUTES ?= 60

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## replicate a real guest, kill its site, recover it at the other (build/demo.json)
	.venv/bin/vrep demo

test: setup ## everything that must hold: lint, native, sanitizers, model, fuzz smoke, pytest
	@scripts/test.sh

bench: setup ## measure, side by side with the peers (build/bench.json)
	.venv/bin/python -m bench

lint: setup ## ruff, mypy, clang-format, cython-lint, codespell
	@scripts/lint.sh

format: setup ## put right what the linters can put right by themselves
	@scripts/lint.sh --fix

docs: setup ## the documentation in build/docs, warnings are errors
	@scripts/docs.sh

asan: setup ## the native tests under the address and undefined behaviour sanitizers
	@scripts/native.sh asan

tsan: setup ## the native tests under the thread sanitizer
	@scripts/native.sh tsan

mutants: setup ## break each invariant in turn, its test must turn red (build/mutants.json)
	.venv/bin/python tests/mutants/run.py

fuzz: setup ## every fuzz target for FUZZ_SECONDS (600) each
	@SECONDS=$(FUZZ_SECONDS) tests/fuzz/run

sim: setup ## the whole system in simulated time: 1,000 worlds and SIM_SEEDS (2000) fresh ones, or SEED=N [TRACE=1]
	@.venv/bin/python tests/sim/run.py $(if $(SEED),--seed $(SEED) $(if $(TRACE),--trace),--seeds 1000 --fresh $(SIM_SEEDS))

soak: setup ## MINUTES (60) of load with faults, history folding (build/soak.json)
	.venv/bin/python tests/soak/soak.py --minutes $(MINUTES)

conformance: setup ## libiscsi's suites against vrep and tgt, in one run (build/conformance.json)
	.venv/bin/python tests/conformance/run.py

package: ## a wheel and a .deb in dist/
	@scripts/install-packages.sh build package
	@scripts/build.sh
	.venv/bin/python packaging/build.py

build: ## make .venv and build vrep into it
	@scripts/install-packages.sh build
	@scripts/build.sh

setup:
	@scripts/install-packages.sh build test
	@scripts/build.sh

clean: ## remove build results, keep .venv
	rm -rf build dist
