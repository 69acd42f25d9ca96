# Everything from nothing: `make` lists what there is. PYTHON=/path/to/python3 chooses the interpreter.

PYTHON ?= python3
BIN     = .venv/bin
SAMPLE  = ../data/sample
LOGS    = ../logs
FLAGS   = --gpu=-1
TRAIN   = --epochs=10 -b 32 --lr 0.02

# one thread a process: the tests are many small pieces, and threads would fight over the cores
TEST_ENV = OMP_NUM_THREADS=1

help:
	@echo 'make demo    install, draw the sample data, train on it, evaluate, attack (some minutes)'
	@echo 'make test    install, then check style and run the tests'
	@echo 'make clean   delete what these two made, except your runs in logs/'

demo: .venv/demo.stamp
	cd code && ../$(BIN)/python make_sample_data.py $(SAMPLE)
	cd code && ../$(BIN)/python main.py $(SAMPLE) $(FLAGS) $(TRAIN)
	@run=`ls -td logs/*_exp_*/ | head -n 1` && best="../$${run}models/model_best.pth.tar" && cd code && \
	    ../$(BIN)/python main.py $(SAMPLE) $(FLAGS) --resume="$$best" -e -v && \
	    ../$(BIN)/python main.py $(SAMPLE) $(FLAGS) --resume="$$best" -a -v && \
	    echo && echo "Look at the curves and pictures of this run:" && \
	    echo "    $(BIN)/tensorboard --logdir=$$run    and open http://localhost:6006"

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TEST_ENV) $(BIN)/python -m pytest

clean:
	rm -rf .venv data/sample .pytest_cache .ruff_cache .hypothesis submission.zip
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the virtual environment; a stamp is older than its requirements file only when that changed

.venv/demo.stamp: requirements.txt | .venv/made.stamp
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/test.stamp: requirements-dev.txt requirements.txt | .venv/made.stamp
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@ .venv/demo.stamp

.venv/made.stamp:
	@$(PYTHON) -c '' 2>/dev/null || \
	    { echo "make: no $(PYTHON) here: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.10 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make a venv: install python3-venv, or choose another with PYTHON="; exit 1; }
	@echo "Installing into .venv (some minutes and gigabytes, once)"
	@$(PYTHON) -m venv .venv
	@touch $@

.PHONY: help demo test clean
