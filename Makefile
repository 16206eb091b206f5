# The two commands of the README, and what the maintainers use. Everything lives in .venv.
TORCH ?= torch==2.13.0
PYTHON ?= python3
DEMO_ARGS ?=
FUZZ_SECONDS ?= 120
BIN := .venv/bin
# Whatever the shell says of it: a program starts twice as fast from bytecode, and starts others.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow check setup format protos docs docs-site benchmark benchmark-fusion-cost benchmark-fusion-real benchmark-fp8 benchmark-fp8-gpu benchmark-transfer reliability reliability-gates fuzz clean

demo: .venv/.ok  ## a whole federation on this machine
	$(BIN)/cofuse demo $(DEMO_ARGS)

test: .venv/.ok  ## the fast suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.ok  ## the long tests
	$(BIN)/python -m pytest -m slow

check: .venv/.ok  ## format, lint, types, layers, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m protos.generate --check

format: .venv/.ok
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: .venv/.ok  ## make the stubs from the .proto files
	$(BIN)/python -m protos.generate

docs: .venv/.ok  ## the pages that are drawn from code
	$(BIN)/python -m coordinator.rounds_page > docs/rounds.md
	$(BIN)/python -m cofuse.reference_pages errors > docs/errors.md
	$(BIN)/python -m cofuse.reference_pages cli > docs/cli.md

docs-site: build/docs-venv/.ok  ## the documentation as a site, in build/site; Sphinx in a venv of its own
	build/docs-venv/bin/sphinx-build -W --keep-going -q -b html -c docs/site docs build/site

build/docs-venv/.ok: docs/site/requirements.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install --quiet -r docs/site/requirements.txt
	touch $@

benchmark: .venv/.ok  ## the comparison of docs/results.md, up to 40 minutes
	$(BIN)/python benchmarks/fusion.py --json

benchmark-fusion-cost: .venv/.ok  ## what a fusion step and an extraction cost, some minutes
	$(BIN)/python benchmarks/fusion_cost.py

benchmark-fusion-real: .venv/.ok  ## a real pretrained model (docs/results-real.md), up to an hour
	$(BIN)/python benchmarks/fusion_real.py --json

benchmark-transfer: .venv/.ok  ## how fast files go in and out, against a bare gRPC stream
	$(BIN)/python benchmarks/transfer.py --json

benchmark-fp8: .venv/.ok  ## the figures of docs/fp8.md, about six minutes
	$(BIN)/python benchmarks/fp8.py

benchmark-fp8-gpu: .venv/.ok  ## ten minutes on a Hopper GPU; writes benchmarks/results/
	$(BIN)/python benchmarks/fp8_gpu.py --out auto

reliability: .venv/.ok  ## kills, crashes, cuts, many participants: up to 40 minutes; writes reliability.json
	$(BIN)/python benchmarks/reliability.py

reliability-gates: .venv/.ok  ## the canary gate and poisoning, of the same commit, into reliability.json
	$(BIN)/python benchmarks/reliability.py --only canary poisoning --add

fuzz: .venv/.ok  ## every parser of foreign bytes under fire, FUZZ_SECONDS each (22 of them)
	$(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS) --json

setup: .venv/.ok

# pip for torch (uv would bring the CUDA build), uv for all the rest (it keeps the torch that is there).
.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '$(TORCH)' 'uv>=0.12,<0.13'
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv cofuse-demo build *.egg-info
