# Each command does all the set-up it needs; repeated runs start at once.
#   make video   make videos of the first puppet prompts with the embedded model, into videos/
#   make test    run the tests (CPU)
#   make demo    open the page that shows frames while they are made (http://127.0.0.1:7860)
#   make lint    ruff check and ruff format --check
# PYTHON=python3.12 chooses the interpreter; PIP_FLAGS="..." is passed to pip.

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
CPU_ONLY := $(if $(shell nvidia-smi -L 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: video test demo lint install clean
.DELETE_ON_ERROR:

video: $(INSTALLED)
	$(BIN)/python inference.py --first 4

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

demo: $(INSTALLED)
	$(BIN)/python demo.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(INSTALLED)

# The stamp is written last, so an install that fails is tried again.
$(INSTALLED): requirements.txt constraints-cpu.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) $(CPU_ONLY) -e ".[demo,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
