# Everything sets itself up: each target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
INTEROP := .venv-interop
TASKS := .venv-tasks
DEMO := demo
RUN := $(VENV)/bin
# More threads than cores make small operations slow; pytest-xdist runs one process per core.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test quick faults test-gpu interop fuzz check lint types format docs bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## make the environment in .venv

# torch first and by its pinned version: any later requirement is then already met.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install -q --upgrade pip
	$(RUN)/pip install -q -c constraints.txt torch
	$(RUN)/pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

demo: install ## quantize a real small model with AWQ and show what it cost
	mkdir -p $(DEMO)
	$(RUN)/python bench/make_model.py $(DEMO)/SmolLM2-135M-Instruct
	$(RUN)/qtool inspect $(DEMO)/SmolLM2-135M-Instruct
	$(RUN)/qtool quantize $(DEMO)/SmolLM2-135M-Instruct --method awq --bits 4 --group-size 64 \
		--windows 32 --seqlen 512 --eval none --overwrite --output $(DEMO)/SmolLM2-135M-awq-w4g64
	$(RUN)/qtool eval $(DEMO)/SmolLM2-135M-awq-w4g64 --ref $(DEMO)/SmolLM2-135M-Instruct \
		--ctx 512 --windows 16

test: install ## run every test: offline, on the CPU
	$(TEST_ENV) $(RUN)/pytest -n $(WORKERS) --dist worksteal

quick: install ## run the tests that take less than a few seconds each
	$(TEST_ENV) $(RUN)/pytest -n $(WORKERS) -m 'not slow'

faults: install ## fail and kill at every call to the file system, not at some
	QTOOL_FAULTS=all $(TEST_ENV) $(RUN)/pytest -n $(WORKERS) tests/faults

test-gpu: install ## run the tests on CUDA; skipped with a reason where there is none
	$(RUN)/pytest --device cuda

interop: install $(INTEROP)/.installed $(TASKS)/.installed ## GPTQModel and lm_eval, in environments of their own
	$(TEST_ENV) QTOOL_INTEROP_PYTHON=$(CURDIR)/$(INTEROP)/bin/python \
		$(RUN)/pytest tests/interop
	$(TEST_ENV) $(TASKS)/bin/pytest tests/interop/test_lm_eval_tasks.py

$(INTEROP)/.installed: tests/interop/constraints-gptqmodel.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install -q --upgrade pip
	$(INTEROP)/bin/pip install -q -c constraints.txt torch
	$(INTEROP)/bin/pip install -q --no-deps -r $<
	touch $@

$(TASKS)/.installed: tests/interop/constraints-lm-eval.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TASKS)
	$(TASKS)/bin/pip install -q --upgrade pip
	$(TASKS)/bin/pip install -q -c constraints.txt torch
	$(TASKS)/bin/pip install -q -c constraints.txt -c $< -e '.[test,tasks]'
	touch $@

# A minute, as in CI; what it finds stays as crash-* beside the corpus.
FUZZ_SECONDS ?= 60

fuzz: install ## fuzz the GGUF pre-check for a minute
	mkdir -p .fuzz
	$(RUN)/python tests/hostile/fuzz_gguf_header.py .fuzz/corpus -max_total_time=$(FUZZ_SECONDS) \
		-timeout=5 -rss_limit_mb=1024 -max_len=65536 -artifact_prefix=.fuzz/

check: lint types docs-current ## everything a change must pass besides the tests

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: install
	$(RUN)/mypy

format: install ## format the code
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

docs: install ## write the generated reference pages
	$(RUN)/python docs/generate.py

.PHONY: docs-current
docs-current: install
	$(RUN)/python docs/generate.py --check

bench: install ## measure quality and speed side by side with peers; see bench/README.md
	$(RUN)/python bench/compare.py

clean: ## remove environments and demo output
	rm -rf $(VENV) $(INTEROP) $(TASKS) $(DEMO)
