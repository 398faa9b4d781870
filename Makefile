# make demo: train an adapter on SmolLM2 and show what it learnt.    make test: linters and the whole suite, offline.
# make proof-NAME: longer proofs; see CONTRIBUTING.md.               make constraints: pin what these install, anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test proof constraints clean

$(VENV)/made: pyproject.toml constraints.txt $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "error: $(PYTHON): Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || { echo "error: $(PYTHON) -m venv: does not work here; install your system's python3-venv"; exit 2; }
	@$${CXX:-c++} --version >/dev/null 2>&1 \
	  || { echo "error: $${CXX:-c++}: a C++ compiler is needed; install g++ or clang, or set CXX=/path/to/one"; exit 2; }
	@echo "installing lorafit and what it needs into $(VENV)"
	$(PIP) install -c constraints.txt pip scikit-build-core cmake ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/made-test: $(VENV)/made
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

demo: $(VENV)/made
	@model=$$($(BIN)/python scripts/fetch_model.py smollm2) && \
	$(BIN)/lorafit train "$$model" --config examples/wikisql/demo.yaml --out runs/demo --overwrite && \
	$(BIN)/python scripts/show_demo.py runs/demo

test: $(VENV)/made-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/python -m pytest

proof: proof-native proof-kill proof-real

proof-%: $(VENV)/made-test
	$(BIN)/python -m pytest -s proofs/test_$*.py

proof-triton: $(VENV)/made-cuda
	$(BIN)/python -m pytest proofs/test_triton.py

proof-track: $(VENV)/made-track
	$(BIN)/python -m pytest proofs/test_track.py

proof-export: $(VENV)/made-verify
	$(BIN)/python -m pytest -s proofs/test_export.py proofs/test_export_experts.py proofs/test_export_gemma4.py

proof-serve: $(VENV)/made-verify
	$(BIN)/python -m pytest -s proofs/test_serve.py

$(VENV)/made-%: $(VENV)/made-test
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

constraints:
	rm -rf $(VENV)-pins && $(PYTHON) -m venv $(VENV)-pins
	$(VENV)-pins/bin/python -m pip install --quiet torch==2.13.0 scikit-build-core cmake ninja
	$(VENV)-pins/bin/python -m pip install --quiet -e '.[test]'
	$(VENV)-pins/bin/python -m pip list --format=freeze --exclude-editable | sed 's/+cpu//' > constraints.txt
	rm -rf $(VENV)-pins

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache
