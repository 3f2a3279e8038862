PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

JOB ?= retinanet
DATA_retinanet := trees
DATA_classifier := digits
DATA_segmentor := nuclei

.PHONY: train test env data

train: env data  ## train on real pictures, or go on with it: JOB=retinanet, classifier or segmentor
	$(PY) tools/train.py configs/tic_$(JOB).py --resume $(ARGS)

test: env  ## run all tests, two at a time
	$(PY) -m pytest --numprocesses 2 $(ARGS)

env:  ## build .venv from pinned versions; nothing to do when it stands
	@$(PYTHON) tools/make_env.py $(VENV)

data: env
	@$(PY) tools/prepare_$(DATA_$(JOB)).py
