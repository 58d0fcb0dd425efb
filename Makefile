# The developers' front door: what each target does stands beside it; how, in scripts/.
.DEFAULT_GOAL := help
.PHONY: help build clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## make .venv and build vrep into it
	scripts/build.sh

clean: ## remove build results, keep .venv
	rm -rf build dist
