PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: train test env data

train: env data  ## train the default detector on real photos, or go on with it
	$(PY) tools/train.py configs/tic_retinanet.py --resume $(ARGS)

test: env  ## run all tests
	$(PY) -m pytest $(ARGS)

env:  ## build .venv from pinned versions; nothing to do when it stands
	@$(PYTHON) tools/make_env.py $(VENV)

data: env
	@$(PY) tools/prepare_trees.py
