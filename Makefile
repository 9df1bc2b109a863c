# `make` alone lists the targets. PROFILE is default or a file of pipelines/config/profiles/.
PROFILE ?= default
VENV ?= .venv
BENCH_VENV ?= .venv-bench
PYTHON ?= python3
PORT ?= 5000
# Not abspath, which takes a space in a path for the end of a name.
BIN := $(if $(filter /%,$(firstword $(VENV))),$(VENV),$(CURDIR)/$(VENV))/bin
export PATH := $(BIN):$(PATH)
# The theme's advice on MkDocs 2, which requirements.lock excludes.
export NO_MKDOCS_2_WARNING := 1
RUN := "$(BIN)/python" -m pipelines.orchestration

.DEFAULT_GOAL := help
.PHONY: help setup repro flow tables td-tables td-claims td-planning td-domains serve status plots ui compare publish promote push pull gc test test-slow lint docs docs-serve examples readme bench peers gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## create .venv from requirements.lock (VENV=… for another place)

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed, found " + sys.version.split()[0] + "; name another one with PYTHON=...")'
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --constraint requirements.lock --editable '.[pipeline,gymnasium,test,lint]'
	touch "$@"

# What builds the site comes when it is first needed, by `make docs` or by the tests of the site.
$(VENV)/.docs-installed: $(VENV)/.installed
	"$(BIN)/python" -m pip install --quiet --constraint requirements.lock --editable '.[docs]'
	touch "$@"

# What runs stages on clusters and keeps results in other stores; no part of the two commands of the README.
$(VENV)/.scale-installed: $(VENV)/.installed
	"$(BIN)/python" -m pip install --quiet --constraint requirements.lock --editable '.[dask,ray,postgres,s3,minari,test-slow]'
	touch "$@"

# The domains of the control suite, and what trains their policies.
$(VENV)/.domains-installed: $(VENV)/.installed
	"$(BIN)/python" -m pip install --quiet --constraint requirements.lock --editable '.[dmc,policies]'
	touch "$@"

repro: setup  ## run what has changed, to the report (PROFILE=smoke|default|paper)
	@$(RUN) repro --profile $(PROFILE)

flow: setup  ## the same stages as a Prefect flow, in parallel
	@$(RUN) flow --profile $(PROFILE)

tables: setup  ## densities beside the literature, an hour on two cores with a mirror; goes on where it was
	@$(RUN) flow --profile density_tables

td-tables: setup  ## the Maze tables of Temporal Difference Flows, an hour on two cores; goes on where it was
	@$(RUN) flow --profile td_tables

td-claims: setup  ## its claims with eight seeds, half an hour on two cores; goes on where it was
	@$(RUN) flow --profile td_claims

td-domains: $(VENV)/.domains-installed  ## its methods on the control suite, under an hour on two cores; goes on where it was
	@$(RUN) flow --profile td_domains

serve: setup  ## retrain on the schedule of params.yaml, with Prefect's pages at http://127.0.0.1:4200
	@$(RUN) serve --profile $(PROFILE)

td-planning: setup  ## planning by its models among the policies of a family, half an hour on two cores; goes on where it was
	@$(RUN) flow --profile td_planning

status: setup  ## what a run would do
	@$(RUN) status --profile $(PROFILE)

plots: setup  ## DVC's plots as a page that needs no network
	@$(RUN) plots --profile $(PROFILE)

ui: setup  ## MLflow on the runs so far, at http://127.0.0.1:5000 (PORT=… for another port)
	@$(RUN) ui --port $(PORT)

compare: setup  ## the newest numbers of every method over seeds (ARGS="--data spiral --metric emd --json")
	@$(RUN) compare --profile $(PROFILE) $(ARGS)

publish: setup  ## copy the runs of bare `dvc repro` to MLflow
	@$(RUN) publish

promote: setup  ## decide which version of each model is the champion (ARGS="--rollback moons.cfm" undoes one)
	@$(RUN) promote --profile $(PROFILE) $(ARGS)

push: setup  ## send results to DVC's remote, with those of every complete profile (or of PROFILE)
	@$(RUN) push --profile $(PROFILE)

pull: setup  ## fetch results from DVC's remote, with the tables of all profiles (or everything of PROFILE)
	@$(RUN) pull --profile $(PROFILE)

gc: setup  ## remove from DVC's cache what neither the project nor a profile uses
	@$(RUN) gc

test: $(VENV)/.docs-installed  ## the tests, on all cores
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.scale-installed $(VENV)/.domains-installed  ## the tests that take minutes, local clusters and stores among them
	@"$(BIN)/python" -m pytest -m slow

lint: setup  ## ruff (rules and format) and mypy
	@"$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/mypy"

docs: $(VENV)/.docs-installed  ## build the documentation into site/; a warning is an error
	@"$(BIN)/python" -m mkdocs build --strict && echo "site/index.html"

docs-serve: $(VENV)/.docs-installed  ## show the documentation at http://127.0.0.1:8000
	@"$(BIN)/python" -m mkdocs serve --dev-addr 127.0.0.1:8000

examples: setup  ## run the scripts in examples/, each under a minute
	@set -e; for script in examples/[a-z]*.py; do echo "$$script"; "$(BIN)/python" $$script; done

readme: setup  ## write the tables of runs into README.md and docs/
	@"$(BIN)/python" -m pipelines.reporting.readme

bench: $(BENCH_VENV)/.installed setup  ## speed beside flow_matching, zuko and torchcfm (ARGS=--quick for five minutes)
	@FLOWMATCH_PYTHON="$(BIN)/python" "$(BENCH_VENV)/bin/python" -m benchmarks $(ARGS)

# Peers are installed apart from the project: torchcfm asks for packages that do not install beside a current torch.
$(BENCH_VENV)/.installed: benchmarks/requirements.txt benchmarks/requirements-no-deps.txt requirements.lock
	$(PYTHON) -m venv "$(BENCH_VENV)"
	"$(BENCH_VENV)/bin/pip" install --quiet --constraint requirements.lock --requirement benchmarks/requirements.txt
	"$(BENCH_VENV)/bin/pip" install --quiet --no-deps --requirement benchmarks/requirements-no-deps.txt
	touch "$@"

peers: $(BENCH_VENV)/.peers-installed  ## tests and tutorials of other libraries, by them and by this one (ARGS="--only zuko")
	@OMP_NUM_THREADS=1 "$(BENCH_VENV)/bin/python" -m peers $(ARGS)

# Beside what the benchmarks install: peers that are compared in values and not in speed.
$(BENCH_VENV)/.peers-installed: $(BENCH_VENV)/.installed peers/requirements.txt
	"$(BENCH_VENV)/bin/pip" install --quiet --constraint requirements.lock --requirement peers/requirements.txt
	touch "$@"

gpu-check: setup  ## test and time the library on a CUDA card, under 8 minutes
	@"$(BIN)/python" -m benchmarks.gpu $(ARGS)

clean:  ## remove what a run leaves behind, except DVC's cache and MLflow's store
	rm -rf .checkpoints .workspaces .flowmatch .prefect .venv-bench build dist site dvc_plots
