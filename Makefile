# make install   .venv with everything pinned (constraints.txt)
# make demo      install, recipes/grpo.py on the bundled base (recipes/g2p/demo.yaml), evaluation on validation words;
#                report in runs/g2p-grpo/
# make test      install, the whole suite
# make soak      the long checks
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test soak lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Evaluates on validation words; the test words are left for `--eval_split test`. An earlier run is moved aside, not lost.
demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch --config_file accelerate_config.yaml recipes/grpo.py --config recipes/g2p/demo.yaml --overwrite_output_dir
	@echo "open runs/g2p-grpo/evaluation/report.html"

test: install
	$(BIN)/python -m pytest -m "not soak"

soak: install
	$(BIN)/python -m pytest -m soak

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
