# Every target makes what it needs, the virtual environment first. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BASELINE ?= main
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENOUGH_FOR_DEMO := $(VENV)/.installed-for-demo
# On Linux, PyPI's torch brings CUDA (gigabytes). For a machine without a GPU:
#   make setup PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# With the clients of all remotes; what constraints.txt pins.
EXTRAS := train,pipeline,track,report,serve,otel,dev,gs,azure
DEMO_EXTRAS := train,report,serve
# Apple's make heeds the exported PATH only where it has to start a shell, which naming one makes it do.
SHELL := /bin/bash
# Stages run as `python -m …`, by dvc and by hand, so the environment comes first on the path.
export PATH := $(abspath $(BIN)):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: help setup data run report serve lint test pytest demo iris rehearse bench preset constraints clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(call install,EXTRAS). torch first and alone: then nothing that depends on it can choose another build.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}. Run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[$(1)]'
endef

# NO_INSTALL=1: the Python on the path has everything, as in the image of CI's jobs and in a rehearsal.
setup: $(if $(NO_INSTALL),,$(INSTALLED))  ## make the virtual environment in .venv, with every package pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(EXTRAS))
	@touch $(ENOUGH_FOR_DEMO) $@

$(ENOUGH_FOR_DEMO): pyproject.toml constraints.txt
	$(call install,$(DEMO_EXTRAS))
	@touch $@

data: setup  ## put the raw data of data.dvc into data/: from the DVC remote, else from the published mirrors
	python -m ml.task.dataset restore

run: setup  ## run what has changed of load → preprocess → train → evaluate, and write the model card
	python -m ml.params
	python -m ml.release.clean
	rm -rf reports/cost
	dvc repro
	python -m ml.report.card
	python -m ml.tracking finish

report: setup  ## compare the last run with a commit: make report BASELINE=main; writes reports/comment.{md,html}
	python -m ml.report.compare --baseline $(BASELINE)
	python -m ml.report.comment --out reports/comment.md --html reports/comment.html

serve: setup  ## serve the model of the last run at http://localhost:8000 (PORT=… for another); /docs describes the API
	bundle=$$(python -m ml.bundle) && MODEL_TAG=$$(basename $$bundle) exec python -m ml.serve

preset: setup  ## write a preset into params.yaml: make preset NAME=essay
	python -m ml.params --preset presets/$(NAME).yaml

LINTERS := black mypy pyflakes imports schema
lint: $(LINTERS)  ## black, mypy (strict), pyflakes, import-linter, the schema of .gitlab-ci.yml

.PHONY: $(LINTERS)
$(LINTERS): setup
black:
	black --check --quiet . || { black --check . ; exit 1; }
mypy:
	mypy
pyflakes:
	pyflakes src tests benchmarks demo deploy examples rehearse .ci
imports:
	lint-imports --no-cache
schema:
	check-jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci .gitlab-ci.yml

test: lint pytest  ## lint, then every test; ends with pytest's summary

pytest: setup  ## every test, without lint: make pytest PYTEST='-m "not slow"'
	-python -m rehearse --install
	pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-report=xml --junitxml=junit.xml $(PYTEST)

demo: $(if $(NO_INSTALL),,$(ENOUGH_FOR_DEMO))  ## a merge request's life on embedded digits, in a scratch workspace, with no download
	python demo/run.py

iris: setup  ## the template with another task (a support vector machine on a CSV file), end to end
	python examples/iris/run.py

rehearse: setup  ## the real .gitlab-ci.yml on this machine: merge request → comment → merge → release, in containers where it can
	python -m rehearse

bench: setup  ## every benchmark beside its peers, written to reports/bench/; hours, on a quiet machine
	python -m benchmarks
	set -e; for part in serving reliability_serve stack registry release gdrive reliability_dvc \
	    'tracking complete' 'tracking restarts' 'tracking seconds' 'tracking overhead' \
	    'verdict simulate' 'verdict seeds' 'verdict speed' 'verdict size'; do \
	        echo "== $$part"; python -m benchmarks.$$part; done

constraints:  ## pin what a fresh installation of pyproject.toml resolves to today; torch stays until changed by hand
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	grep -E '^(torch|torchvision)==' constraints.txt > $(VENV)/torch.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/torch.txt torch
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/torch.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## remove the virtual environment and what the demo and the tests left
	rm -rf $(VENV) demo/workspace rehearse/workspace .checkpoints .mypy_cache .pytest_cache .hypothesis dvc_plots
