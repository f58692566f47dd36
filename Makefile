# Two commands: `make demo` (environment, demo search, how to look at it) and `make test` (lint, types, all tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
# Memory in pages of 2 MiB where the system gives them if asked (gptailor/heap.py): tests that train take a fifth less of the processor.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo quick test browser-test dashboard reference pictures gpu-check bench soak kills

demo: $(VENV)/.ready
	$(BIN)/python -m gptailor search data/presets/demo.yaml
	@echo
	@echo "Look at it:  make dashboard    (or: $(BIN)/streamlit run streamlit_app.py)"

dashboard: $(VENV)/.ready
	$(BIN)/streamlit run streamlit_app.py

# What takes under three minutes: lint, types, and the tests that are not in tests/slow_tests.txt, which both bring up to date.
quick: $(VENV)/.ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser and not alone" --quick --record-slow

test: $(VENV)/.ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/audit.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser and not alone" --record-slow --durations 20
	$(BIN)/python -m pytest -n 2 --dist loadfile -m browser
	$(BIN)/python -m pytest -m alone

browser-test: $(VENV)/.ready-tests
	$(BIN)/python -m pytest -m browser

# docs/reference/, from the run file's fields and the command line's parser.
reference: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python docs/write_reference.py

# docs/pictures/, from the demo search and its real pages in Chromium.
pictures: $(VENV)/.ready-tests
	PYTHONPATH=.:tests $(BIN)/python docs/take_pictures.py

# Whatever a GPU does otherwise than a CPU, in under 8 minutes on one device, without a network.
gpu-check: $(VENV)/.ready
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 $(BIN)/python -m bench.gpu_check

bench: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/bench/engine.py

# Everything at once for half an hour; and the demo search killed 20 times beside one that is left in peace.
soak: $(VENV)/.ready-tests
	$(BIN)/python tests/bench/soak.py --minutes 30

kills: $(VENV)/.ready-tests
	$(BIN)/python tests/helpers/kills.py

$(VENV)/.ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-tests: $(VENV)/.ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	sh tests/install_chromium.sh
	touch $@
