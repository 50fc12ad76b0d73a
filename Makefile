# Both commands of the README do all their set-up themselves on a machine that has Python 3.11 or later, git, make and gcc.
PYTHON ?= python3
VENV   ?= .venv
STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin

.PHONY: train test lint types unit site site-version clean
.DEFAULT_GOAL := help

help:
	@echo "make train   train a character GPT on 4 processes with pipeoptim, about 2 minutes on 2 cores; shows the loss curve's path"
	@echo "make test    everything that CI checks: lint, types, tests"
	@echo "make lint | types | unit   its three parts"
	@echo "make site    the documentation as a site, build/site/index.html; opens from the disk"
	@echo "make site-version   the same as one of several versions, committed to the branch gh-pages"

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[test,third-party,data,docs]'
	@touch $@

train: $(STAMP)
	$(RUN)/pipeoptim train --engine processes $(ARGS)

test: lint types unit

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(STAMP)
	$(RUN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# The notice that is switched off advertises MkDocs' successor.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# The site in a folder of its minor version, on the branch gh-pages of this repository: what is to be published. Another version's folder stays.
site-version: VERSION = $(shell sed -nE 's/^__version__ = "([0-9]+\.[0-9]+).*/\1/p' src/pipeoptim/version.py)
site-version: $(STAMP)
	. $(RUN)/activate && SITE_VERSIONS=mike NO_MKDOCS_2_WARNING=1 mike deploy --update-aliases --allow-empty $(MIKE) $(VERSION) latest
	$(RUN)/mike set-default --allow-empty $(MIKE) latest
	@echo "the branch gh-pages has version $(VERSION)"

clean:
	rm -rf $(VENV) build dist src/*.egg-info
