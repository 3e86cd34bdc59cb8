# make demo   installs everything into .venv, aligns speech with words, searches, draws spoken words, and adds pictures
# make test   installs everything into .venv, then lints, checks types and tests, all without a network
# make bench  the measurements of benchmarks/, printed and written to benchmarks/RESULTS.md
# make alone  each plugin in an environment of its own with the core and nothing else of ours, and its tests there
# make torture  the attacks of docs/PROMISES.md at full length, with their counts (under 40 minutes on two cores)
# make reference  docs/reference/ from docstrings and the command line
# make coverage  which lines of the core, the page, the index and subset the tests reach
# make dist   wheels and sdists of the core and the plugins, installed into an empty environment, where `align` runs
# make floors  the tests, on the lowest versions that the pyproject.toml files accept, in an environment of its own (7 GB with CUDA's libraries)
# make lock   pins what make test installs again, in requirements.lock (requirements-clap.lock for .venv-clap)
# make audit  known vulnerabilities among what is pinned; asks PyPI's advisory database

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(addprefix plugins/bridgekit-,app datasets index ray starter subset timm transformers template)
CHECKED := bridgekit docs/hooks.py docs/make_reference.py plugins/bridgekit-starter/training examples benchmarks $(foreach name,app datasets index ray starter subset timm transformers clap,plugins/bridgekit-$(name)/bridgekit_$(name)) plugins/bridgekit-template/bridgekit_template.py $(wildcard plugins/bridgekit-template/modalities/*.py)
# Not in .venv: laion-clap needs numpy below 2.
CLAP := .venv-clap
LOCK := --quiet --upgrade --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock" --overrides $(VENV)/without-torch.txt --no-emit-package bridgekit-core --no-emit-package torch --no-emit-package torchvision
FLOORS := .venv-floors
# Not the tests of documents and pages, of plugins in environments of their own, and of what takes minutes and needs no other package.
FLOOR_TESTS := tests plugins/bridgekit-transformers plugins/bridgekit-timm plugins/bridgekit-app/tests/test_server.py plugins/bridgekit-app/tests/test_toy_server.py $(foreach name,docs notebook report scaffold long_runs,--ignore tests/test_$(name).py)
# Offline: any Hugging Face call without a network would retry for minutes.
export HF_HUB_OFFLINE := 1

.PHONY: demo test bench torture reference coverage alone floors dist lock audit clean

# The lock pins all but torch, whose build depends on the machine.
$(VENV)/.installed: pyproject.toml requirements.lock $(PLUGINS:%=%/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this takes a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[dev,docs]" $(PLUGINS:%=--editable "%[test]")
	touch $@

$(CLAP)/.installed: pyproject.toml requirements-clap.lock plugins/bridgekit-clap/pyproject.toml
	test -x $(CLAP)/bin/python || $(PYTHON) -m venv $(CLAP)
	$(CLAP)/bin/python -m pip install --quiet --constraint requirements-clap.lock --editable . --editable "plugins/bridgekit-clap[test]"
	touch $@

# Threads that wait must not take CPU time from those that work: the bridgekit command sees to that itself, examples do not.
demo: export OMP_WAIT_POLICY := passive
demo: $(VENV)/.installed
	mkdir -p demo
	@echo "1 of 7: speak 1,800 words, encode them and their text, and align the two (about a minute)"
	cd demo && ../$(BIN)/bridgekit align --a audio --b text --overwrite
	@echo "2 of 7: speak three words in a voice that the bridge has never heard"
	cd demo && ../$(BIN)/python ../examples/say_words.py penguin "red apple" "fire engine"
	@echo "3 of 7: find the words"
	cd demo && ../$(BIN)/bridgekit search penguin.wav red_apple.wav fire_engine.wav -k 3
	@echo "4 of 7: draw what was said"
	cd demo && ../$(BIN)/bridgekit generate --audio penguin.wav
	@echo "5 of 7: add pictures to the bridge"
	cd demo && ../$(BIN)/bridgekit bind bridges/audio-text --add image --pairs starter:openmoji
	@echo "6 of 7: find pictures of the words"
	cd demo && ../$(BIN)/bridgekit search penguin.wav red_apple.wav fire_engine.wav --to image --through text -k 3
	@echo "7 of 7: speak six words and draw each"
	cd demo && ../$(BIN)/python ../examples/say_it_see_it.py

# Pages are tested in a real browser. Where none can be installed, those tests are skipped and say so.
$(VENV)/.browser: $(VENV)/.installed
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "Installing chromium for the tests of pages" \
	     && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	|| echo "No Chromium here, and not root of a Debian to install one: the tests of pages will be skipped"
	touch $@

test: $(VENV)/.installed $(VENV)/.browser $(CLAP)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy $(CHECKED)
	# Two workers of one thread each: small tests gain nothing from threads, and threads that outnumber cores wait on each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(CLAP)/bin/python -m pytest plugins/bridgekit-clap

alone: $(foreach name,app datasets index starter subset timm transformers template clap,.venv-$(name)/.tested)

.venv-%/.tested: FORCE
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable . --editable "plugins/bridgekit-$*[test]"
	OMP_NUM_THREADS=1 $(@D)/bin/python -m pytest plugins/bridgekit-$*

FORCE:

# Resolved from the files: of what is installed, uv would take only the core itself as direct.
floors:
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet uv
	printf 'bridgekit-core; sys_platform == "never"\n' > $(FLOORS)/without-core.txt
	$(FLOORS)/bin/uv pip compile --quiet --upgrade --resolution lowest-direct --python $(FLOORS)/bin/python --overrides $(FLOORS)/without-core.txt --no-emit-package bridgekit-core pyproject.toml $(PLUGINS:%=%/pyproject.toml) $(foreach extra,dev generate media sentencepiece test torchvision,--extra $(extra)) --output-file $(FLOORS)/floors.txt
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python --requirement $(FLOORS)/floors.txt
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python --no-deps --editable . $(PLUGINS:%=--editable %)
	OMP_NUM_THREADS=1 BRIDGEKIT_FLOORS=yes $(FLOORS)/bin/python -m pytest -n 2 --dist loadfile $(FLOOR_TESTS)

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/run.py

torture: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

reference: $(VENV)/.installed
	$(BIN)/python docs/make_reference.py

coverage: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov=bridgekit --cov=bridgekit_app --cov=bridgekit_index --cov=bridgekit_subset --cov-report=term:skip-covered

lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	printf 'bridgekit-core; sys_platform == "never"\ntorch; sys_platform == "never"\ntorchvision; sys_platform == "never"\n' > $(VENV)/without-torch.txt
	$(BIN)/uv pip compile $(LOCK) pyproject.toml $(PLUGINS:%=%/pyproject.toml) --extra dev --extra docs --extra generate --extra test --output-file requirements.lock
	$(BIN)/uv pip compile $(LOCK) pyproject.toml plugins/bridgekit-clap/pyproject.toml --extra test --output-file requirements-clap.lock

# The environment has nothing of this folder; its folder has no pairs but the starter's, which are spoken and encoded (two minutes).
dist: $(VENV)/.installed
	rm -rf dist .venv-dist
	for project in . $(addprefix plugins/bridgekit-,app clap index ray starter subset timm transformers); do \
	  $(BIN)/python -m build --quiet --outdir dist $$project || exit 1; done
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --constraint requirements.lock --find-links dist "bridgekit-core[all]"
	mkdir .venv-dist/try
	cd .venv-dist/try && BRIDGEKIT_HOME=$(CURDIR)/.venv-dist/home ../bin/bridgekit align --a audio --b text

# --strict: a package that cannot be looked up is a failure, not skipped silently.
audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement requirements-clap.lock

clean:
	rm -rf $(VENV) .venv-* demo dist
