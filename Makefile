# `make` lists the targets. PYTHON=/path/to/python selects the interpreter.

PYTHON  ?= python3
VENV     = .venv/bin
INSTALL  = $(VENV)/python -m pip install --disable-pip-version-check
SAMPLE   = ../data/sample
DEVICE   = --gpu=-1
DATA     = data
TRAINING = --epochs=12 --lr=0.05 --warmup=1 -b 32

help:
	@echo "make demo     install; draw sample data; train, evaluate and attack on it"
	@echo "make test     install; check the style; run the tests"
	@echo "make test-lowest   run the tests with the lowest versions that requirements.txt allows"
	@echo "make gpu-check DATA=data     check everything on this GPU, with timings"
	@echo "make gpu-robust DATA=data    train and attack a robust classifier; DATA holds cifar10/"
	@echo "make clean    delete what demo and test install and draw; runs in logs/ stay"

demo: .venv/demo.stamp
	cd code && ../$(VENV)/python make_sample_data.py $(SAMPLE)
	@echo
	@echo "The curves grow while it trains. Type in another terminal, and open http://localhost:6006:"
	@echo "    $(VENV)/tensorboard --logdir=logs"
	@echo
	cd code && ../$(VENV)/python main.py $(SAMPLE) $(DEVICE) $(TRAINING)
	cd code && ../$(VENV)/python main.py $(SAMPLE) $(DEVICE) --resume=$(BEST) -e -v
	cd code && ../$(VENV)/python main.py $(SAMPLE) $(DEVICE) --resume=$(BEST) -a -v
	@echo
	@echo "Next: activate the environment, look at curves and images (http://localhost:6006),"
	@echo "make a report, or train on MiniPlaces:"
	@echo "    . $(VENV)/activate"
	@echo "    tensorboard --logdir=`ls -td logs/*_exp_* | head -n 1`"
	@echo "    cd code && python report.py ../`ls -td logs/*_exp_* | head -n 1` && cd .."
	@echo "    sh download_dataset.sh && cd code && python main.py ../data --epochs=60"

# The shell expands it when the command runs: the newest run is the one just trained
BEST = "`ls -td ../logs/*_exp_* | head -n 1`/models/model_best.pth.tar"

test: .venv/test.stamp
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest $(PARALLEL)

# A module's tests share what they start from: they run in one process, in the order of conftest.py
PARALLEL = -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# The lowest versions that requirements.txt allows, in .venv-lowest
test-lowest: .venv-lowest/stamp
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(PARALLEL)

# On a GPU machine's own Python, which has the torch for its driver
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(DATA)

gpu-robust:
	$(PYTHON) benchmarks/gpu_check.py $(DATA) --parts=robust

clean:
	rm -rf .venv .venv-lowest data/sample submission.zip .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- The virtual environment: requirements newer than a stamp are installed again

.venv/demo.stamp: requirements.txt | .venv/made.stamp
	$(INSTALL) -r requirements.txt
	@touch $@

.venv/test.stamp: requirements.txt requirements-dev.txt | .venv/made.stamp
	$(INSTALL) -r requirements-dev.txt
	@touch $@ .venv/demo.stamp

.venv-lowest/stamp: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-lowest
	sed 's/>=\(.*\)/==\1.*/' requirements.txt > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -q -r .venv-lowest/lowest.txt -r requirements-dev.txt
	@touch $@

ELSE = use another: make $(MAKECMDGOALS) PYTHON=/path/to/python

.venv/made.stamp:
	@$(PYTHON) -c "" 2>/dev/null || { echo "$(PYTHON) is not installed; $(ELSE)"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "$(PYTHON) is older than Python 3.10; $(ELSE)"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a venv: install python3-venv (apt), or $(ELSE)"; exit 1; }
	@echo "Installing into .venv: takes minutes and gigabytes, once"
	@$(PYTHON) -m venv .venv
	@touch $@

.PHONY: help demo test test-lowest gpu-check gpu-robust clean
