# ldm_nb: `make` alone lists what there is. Needs Python 3.11 or newer with venv, and make; everything else goes into $(VENV).
#   make test PYTHON=python3.12      another Python to build the environment with
#   make check VENV=~/envs/x READY=1 an environment that already holds everything: nothing is installed

VENV   ?= .venv
BIN    := $(VENV)/bin
ENOUGH := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
            if command -v $$p >/dev/null 2>&1 && $$p -c '$(ENOUGH)' >/dev/null 2>&1; then echo $$p; break; fi; done)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUFF   := $(BIN)/python -m ruff check --output-format concise
WORKERS ?= 2

ifdef READY
export PYTHONPATH := $(CURDIR)
else
PACKAGE := $(VENV)/.installed
TOOLS   := $(VENV)/.installed-dev
endif

SEED    ?= 0
OUT     ?= runs/speedrun-$(SEED)
STUDENT ?= student/nbs
DIR     ?= $(STUDENT)
PORT    ?= 8866

.PHONY: help setup demo speedrun lab app student grade check quick test bench prove notebooks readme site serve
help:
	@echo 'make demo       captions become postcards: writes demo.png     (first 3 min to install, then under half a minute)'
	@echo 'make speedrun   a text-to-image model from nothing, against the clock (SEED=0 OUT=runs/speedrun-0; under an hour on two cores)'
	@echo 'make lab        opens JupyterLab at the first chapter'
	@echo 'make app        the panels as a web page, on this machine alone   (PORT=8866; Ctrl-C ends it)'
	@echo 'make site       all chapters as a web site, in _site/              (needs npm; 2 min when a chapter has changed)'
	@echo 'make serve      builds the site and shows it, on this machine     (PORT=8867; Ctrl-C ends it)'
	@echo 'make student    the notebooks without their solutions, in student/nbs, in the same folders   (STUDENT=elsewhere/nbs)'
	@echo 'make grade      tries the answers in DIR, by default student/nbs   (under a minute)'
	@echo 'make setup      installs everything into $(VENV), once             (3 min; 6 GB on Linux)'
	@echo 'make check      notebooks exported and clean, lint, story, diagrams, README (10 s)'
	@echo 'make quick      check, and the unit tests of what changed         (2 min)'
	@echo 'make test       check, then every notebook, then pytest           (about 30 min on two busy cores)'
	@echo 'make bench      our modules beside those of diffusers: time and memory, in turn   (long: it compiles; on two quiet cores)'
	@echo 'make prove      the proofs that are too long for a test: 20 kills, costs, the cache   (about an hour)'
	@echo 'make notebooks  runs every notebook again, keeps its outputs      (long; NB="story/06_unet 05_samplers": those alone)'
	@echo 'make readme     README.md from nbs/index.ipynb                    (5 s)'

setup: $(PACKAGE) $(TOOLS)
	@echo 'Everything is in $(VENV). Next: make demo, make lab or make test.'

demo: $(PACKAGE)
	@echo 'Drawing postcards from captions: under half a minute on two cores ...'
	@$(BIN)/python -m ldm_nb.cli.demo --out demo.png

speedrun: $(PACKAGE)
	@$(BIN)/python -m ldm_nb.cli.speedrun --seed $(SEED) --out $(OUT)

lab: $(PACKAGE) $(TOOLS)
	@$(BIN)/python -m jupyterlab nbs/story/00_start_here.ipynb

app: $(PACKAGE) $(TOOLS)
	@echo 'The lab: http://127.0.0.1:$(PORT)/ (this machine alone; the first page takes about 10 seconds; Ctrl-C ends it)'
	@$(BIN)/python -m voila nbs/lab/04_lab.ipynb --Voila.ip=127.0.0.1 --port=$(PORT) --no-browser --show_tracebacks=True \
	  --VoilaConfiguration.extension_denylist=jupyterlab-jupytext

site: $(PACKAGE) $(TOOLS)
	@$(BIN)/python site/build.py --out _site

serve: PORT := 8867
serve: site
	@$(BIN)/python site/serve.py --root _site --port $(PORT)

student: $(PACKAGE)
	@$(BIN)/python -m ldm_nb.course.grading student --out '$(STUDENT)'

grade: $(PACKAGE)
	@$(BIN)/python -m ldm_nb.course.grading grade '$(DIR)' $(if $(JSON),--json '$(JSON)')

check: $(PACKAGE) $(TOOLS)
	@bad=0; for c in 'notebooks.py check' story.py 'diagrams.py check' 'times.py check' 'readme.py --check'; do $(BIN)/python .ci/$$c || bad=1; done; \
	$(RUFF) nbs tests .ci site setup.py || bad=1; $(RUFF) --select F ldm_nb || bad=1; exit $$bad

quick: check
	@$(BIN)/python .ci/quick.py

# one thread a worker: two workers on two cores then do not fight over them
test: check
	@$(BIN)/python .ci/nbdev3.py
	@$(BIN)/python site/build.py --packages || echo 'Without them the explainer is not tested.'
	@echo 'Running every notebook, $(WORKERS) at a time ...'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	@echo 'Running the tests in tests/ ...'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

bench: $(PACKAGE) $(TOOLS)
	@$(BIN)/python tests/prove/bench.py

prove: $(PACKAGE) $(TOOLS)
	@for p in kills cache training_speed loading breaking planted; do $(BIN)/python tests/prove/$$p.py || exit 1; done

notebooks: $(PACKAGE) $(TOOLS)
	@$(BIN)/python .ci/notebooks.py run $(NB)
	@$(BIN)/python .ci/readme.py

readme: $(PACKAGE) $(TOOLS)
	@$(BIN)/python .ci/readme.py

$(BIN)/python:
	@p='$(PYTHON)'; if [ -z "$$p" ] || ! $$p -c '$(ENOUGH)' >/dev/null 2>&1; then \
	  echo "ldm_nb needs Python 3.11 or newer with venv (found: $$( ($${p:-python3} --version) 2>&1 | head -n 1)). Install it (Debian, Ubuntu: apt install python3-venv) or name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$p --version) ..."; $$p -m venv '$(VENV)'

$(VENV)/.installed: setup.py settings.ini pyproject.toml | $(BIN)/python
	@echo 'Installing ldm_nb and what it runs on into $(VENV): about 3 minutes, once ...'
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'Installing what its checks and notebooks need: under a minute, once ...'
	@$(PIP) -e '.[dev]'
	@touch $@
