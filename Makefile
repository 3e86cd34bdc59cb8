# make demo   installs everything into .venv, aligns speech with words, searches, and makes pictures of spoken words
# make test   installs everything into .venv, then lints, checks types and tests, all without a network
# make bench  the measurements of benchmarks/, printed and written to benchmarks/RESULTS.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := plugins/bridgekit-starter
# Offline: any Hugging Face call without a network would retry for minutes.
export HF_HUB_OFFLINE := 1

.PHONY: demo test bench clean

$(VENV)/.installed: pyproject.toml $(PLUGINS:%=%/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this takes a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" $(PLUGINS:%=--editable "%[test]")
	touch $@

demo: $(VENV)/.installed
	mkdir -p demo
	cd demo && ../$(BIN)/bridgekit align --a audio --b text --overwrite
	cd demo && ../$(BIN)/python ../examples/say_words.py penguin "red apple" "fire engine"
	cd demo && ../$(BIN)/bridgekit search penguin.wav red_apple.wav fire_engine.wav -k 3
	cd demo && ../$(BIN)/bridgekit generate --audio penguin.wav
	cd demo && ../$(BIN)/python ../examples/say_it_see_it.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bridgekit plugins/bridgekit-starter/bridgekit_starter plugins/bridgekit-starter/training examples benchmarks
	# Two workers of one thread each: small tests gain nothing from threads, and threads that outnumber cores wait on each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) demo
