# Five verbs. Each does its own set-up: a virtual environment in .venv, installed under constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench docs fix organism organism-report trait-space dose steering setup fuzz faults

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)      ## the whole story, offline, on the pocket organism
	$(BIN)/tiltmeter demo

test: $(STAMP)      ## the default tests: offline, CPU, warnings as errors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)     ## lint, types, generated docs
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/python docs/make.py --check

fix: $(STAMP)
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

docs: $(STAMP)      ## regenerate the pages that are made from code and from docs/results
	$(BIN)/python docs/make.py

bench: $(STAMP)     ## measure speed; writes docs/results/speed.json
	$(BIN)/python bench/bench.py

faults: $(STAMP)    ## kill -9, full disks, second writers ...: what is lost; N=500 kills and KEEP=FILE to go on
	$(BIN)/python bench/trust/faults.py --kills $(or $(N),20) $(if $(KEEP),--progress $(KEEP)) --results docs/results/trust.json

organism: $(STAMP)  ## grow the shipped organism anew (about 15 minutes on two cores)
	$(BIN)/tiltmeter organism build --family llama --size S --name pocket --out .cache/organisms/pocket

organism-report: $(STAMP)  ## what the organism does and how the detector does on it (about an hour on two cores)
	$(BIN)/tiltmeter study organism --out .cache/organism-report --results docs/results/organism.json
	$(BIN)/python docs/make.py

# The studies go on where they stopped; hours on two cores from nothing. Each writes its page's figures.
trait-space: $(STAMP)
	$(BIN)/tiltmeter study trait-space --out .cache/trait-space

dose: $(STAMP)
	$(BIN)/tiltmeter study dose --out .cache/dose --results docs/results/dose.json --figure docs/dose.svg

steering: $(STAMP)
	$(BIN)/tiltmeter study steering --out .cache/steering --results docs/results/steering.json

N ?= 1000000
fuzz: $(STAMP)      ## spoilt files for every loader, N in all; goes on where it stopped; writes docs/results/trust.json
	OMP_NUM_THREADS=1 nice $(BIN)/python bench/trust/fuzz.py -n $(N)
