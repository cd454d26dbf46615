PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := benchmarks/peers

.PHONY: help install demo test check format clean bench memory vectors conformance fuzz quality sizes
.PHONY: storage storage-peers fusion transfer

help:
	@echo "make demo     pack, verify and unpack a real fine-tune (about 4 minutes on 2 cores)"
	@echo "make test     the whole default test suite"
	@echo "make check    format, lint and types, changing nothing"
	@echo "make format   put the code in its format"
	@echo "make bench    encode and decode speed beside a plain copy (CPU)"
	@echo "make memory   peak memory of pack and unpack on a 6 GB checkpoint (needs 20 GB of disk)"
	@echo "make vectors  write the format's conformance vectors"
	@echo "make conformance  read every vector with every reader, write format_spec/CONFORMANCE.md"
	@echo "make fuzz     fuzz reader and codecs, FUZZ_SECONDS each (default 60; Linux)"
	@echo "make sizes    write the table of the codecs' sizes, tests/sizes.csv"
	@echo "make quality  quality against bits: baselines and ours on six real fine-tunes (hours)"
	@echo "make fusion   fine-tunes merged into one encoder by every method (hours)"
	@echo "make transfer what a fine-tune learns and forgets, and what transfer keeps (an hour)"
	@echo "make storage  size, encode and decode speed beside every peer (about an hour)"
	@echo "make storage-peers  install those peers, each in an environment of its own (5 GB of disk)"
	@echo "make clean    remove the environment and everything built"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "installing into $(VENV) (about two minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	@$(BIN)/python -m pytest

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)
	@$(BIN)/python benchmarks/codec_speed.py

memory: $(STAMP)
	@$(BIN)/python benchmarks/memory.py

vectors: $(STAMP)
	@$(BIN)/python format_spec/vectors/generate.py

conformance: $(STAMP)
	@$(BIN)/python format_spec/conformance.py

quality: $(STAMP)
	@$(BIN)/python benchmarks/quality.py

fusion: $(STAMP)
	@$(BIN)/python benchmarks/fusion.py

transfer: $(STAMP)
	@$(BIN)/python benchmarks/transfer.py

storage: $(STAMP)
	@$(BIN)/python benchmarks/storage.py

storage-peers: $(patsubst $(PEERS)/%.txt,$(PEERS)/.envs/%/.installed,$(wildcard $(PEERS)/*.txt))

$(PEERS)/.envs/%/.installed: $(PEERS)/%.txt
	@echo "installing $* into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

sizes: $(STAMP)
	@$(BIN)/python tests/sizes.py

clean:
	rm -rf $(VENV) $(PEERS)/.envs demo-output fuzz-work build dist *.egg-info
