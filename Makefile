# The two commands of this repository are `make quickstart` and `make test`; nothing needs to be installed before.
# PYTHON chooses the interpreter, 3.11 to 3.13:  make test PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help install quickstart test test-code test-notebooks test-faults test-parity test-tunix test-harness test-ungar
.PHONY: test-s3 test-reasoning-gym test-slurm test-distributed test-tutorial test-mlflow test-pages tensorboard lab lint
.PHONY: bench clean

help:
	@echo "make install      the pinned packages into .venv; every other target does it first, too"
	@echo "make quickstart   train a tiny Gemma on reasoning traces and report before against after (minutes)"
	@echo "make test         every test, the notebooks among them; test-code and test-notebooks are its halves"
	@echo "make test-faults  every fault of docs/reliability.md in its full count (an hour)"
	@echo "make test-parity  our Gemma against the one of transformers and torch, which it installs into .venv-parity"
	@echo "make test-tunix   our trainer against Tunix's, which it installs into .venv-tunix"
	@echo "make test-harness our model under lm-evaluation-harness, which it installs into .venv-harness"
	@echo "make test-ungar   our engine against UNGAR, which it installs into .venv-ungar"
	@echo "make test-s3      imports from a server that speaks S3, which it installs into .venv-s3"
	@echo "make test-reasoning-gym  every generator of reasoning-gym, installed into .venv-reasoning-gym (ten minutes)"
	@echo "make test-slurm   a sweep on a Slurm of this machine, as root; installs Debian's, and submitit into .venv-slurm"
	@echo "make test-mlflow  runs told to MLflow and TensorBoard, which it installs into .venv-mlflow"
	@echo "make test-tutorial  docs/tutorial.md followed to its end (minutes)"
	@echo "make test-distributed  training by several processes: the same losses, killed, resumed (minutes)"
	@echo "make test-pages   every page through an HTML validator and axe; npm's, which it installs into .venv-pages, and Chromium"
	@echo "make lab          JupyterLab, on a page that says where to begin"
	@echo "make tensorboard  TensorBoard on all runs that were told to it, installed into .venv"
	@echo "make lint         ruff"
	@echo "make bench        speed and memory, beside Tunix, TRL and transformers, into docs/performance.md (an hour)"
	@echo "make clean        remove .venv and those beside it (runs/ stays)"

install: $(READY)

quickstart: $(READY)
	@$(BIN)/python -m lib run configs/quickstart.yaml

test: $(READY) lint
	@$(MAKE) --no-print-directory -j 2 test-code test-notebooks # the notebooks beside: tests that wait leave a core free

test-code: $(READY)
	@$(BIN)/python -m pytest -p no:nbval -n 2 --dist loadfile --no-loadscope-reorder

test-notebooks: $(READY)
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && RETRACE_HOME=$$home $(BIN)/python -m pytest --nbval-lax notebooks

test-faults: $(READY)
	@RETRACE_FAULTS=full RETRACE_BROWSER=required $(BIN)/python -m pytest tests/faults tests/data/test_fuzz_import.py tests/data/test_tables.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lab: $(READY)
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(BIN)/jupyter lab

bench: $(READY) .venv-tunix/ready .venv-peers/ready
	@RETRACE_TUNIX_PYTHON="$(CURDIR)/.venv-tunix/bin/python" RETRACE_PEERS_PYTHON="$(CURDIR)/.venv-peers/bin/python" \
		$(BIN)/python benchmarks/performance.py

test-parity: $(READY) .venv-parity/ready
	@RETRACE_PARITY_PYTHON="$(CURDIR)/.venv-parity/bin/python" $(BIN)/python -m pytest -m parity -rP tests/model

test-ungar: $(READY) .venv-ungar/ready
	@RETRACE_UNGAR_PYTHON="$(CURDIR)/.venv-ungar/bin/python" $(BIN)/python -m pytest -m ungar tests/tasks

test-tunix: .venv-tunix/ready
	@.venv-tunix/bin/python -m pytest -m tunix -rP tests/training/test_tunix.py

test-harness: .venv-harness/ready
	@.venv-harness/bin/python -m pytest -m harness -rP tests/evaluation/test_harness.py

test-s3: $(READY) .venv-s3/ready
	@RETRACE_S3_PYTHON="$(CURDIR)/.venv-s3/bin/python" $(BIN)/python -m pytest -m s3 -rP tests/data/test_s3.py

test-reasoning-gym: $(READY) .venv-reasoning-gym/ready
	@RETRACE_REASONING_GYM_PYTHON="$(CURDIR)/.venv-reasoning-gym/bin/python" $(BIN)/python -m pytest -m reasoning_gym -rP \
		tests/evaluation/test_reasoning_gym_items.py

test-slurm: .venv-slurm/ready
	@command -v slurmd >/dev/null && command -v munged >/dev/null || apt-get install -y -qq --no-install-recommends slurm-wlm munge
	@.venv-slurm/bin/python -m pytest -m slurm -rP tests/experiments/test_slurm.py

test-mlflow: .venv-mlflow/ready
	@.venv-mlflow/bin/python -m pytest -m mlflow -rP tests/experiments/test_tracking.py

tensorboard: .venv/tensorboard
	@$(BIN)/tensorboard --logdir "$${RETRACE_HOME:-runs}"

test-pages: $(READY) .venv-pages/ready
	@RETRACE_BROWSER=required $(BIN)/python -m pytest -m pages tests/experiments/test_pages.py

test-tutorial: $(READY)
	@$(BIN)/python -m pytest -m tutorial tests/test_docs.py

test-distributed: $(READY)
	@$(BIN)/python -m pytest -m distributed -rP tests/experiments/test_launch.py tests/model/test_processes.py

clean:
	rm -rf .venv .venv-*

$(READY): requirements.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11, 3.12 or 3.13 is needed and was not found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11, 3.12 or 3.13 is needed, this is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv), then run make again" >&2; exit 1; }
	@echo "Installing the packages into .venv (a minute or two, once) …"
	@$(PYTHON) -m venv --clear .venv
	@awk '{ print > (".venv/part-" NR % 8 ".txt") }' requirements.txt # pip takes one core, so there are several
	@printf '%s\n' .venv/part-*.txt | xargs -n 1 -P $$(getconf _NPROCESSORS_ONLN) sh -c '$(BIN)/pip install --quiet \
		--disable-pip-version-check --no-compile --no-deps -r "$$0" || exit 255' # they name all; after 255 xargs begins no more
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true # on all cores, too; like pip, it passes over what is not Python
	@touch $(READY)

.venv-parity/ready: requirements-parity.txt $(READY)
	@echo "Installing torch and transformers into .venv-parity (once) …"
	@$(PYTHON) -m venv --clear .venv-parity
	@.venv-parity/bin/pip install --quiet --disable-pip-version-check -r requirements-parity.txt
	@touch .venv-parity/ready

.venv-harness/ready: requirements.txt requirements-harness.txt $(READY)
	@echo "Installing lm-evaluation-harness into .venv-harness (once) …"
	@$(PYTHON) -m venv --clear .venv-harness
	@.venv-harness/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-harness.txt
	@touch .venv-harness/ready

# Its card games need numpy alone of what UNGAR names, and torch is large.
.venv-ungar/ready:
	@echo "Installing UNGAR into .venv-ungar (once) …"
	@$(PYTHON) -m venv --clear .venv-ungar
	@.venv-ungar/bin/pip install --quiet --disable-pip-version-check numpy
	@.venv-ungar/bin/pip install --quiet --disable-pip-version-check --no-deps git+https://github.com/m-cahill/ungar
	@touch .venv-ungar/ready

.venv-reasoning-gym/ready: requirements-reasoning-gym.txt $(READY)
	@echo "Installing reasoning-gym into .venv-reasoning-gym (once) …"
	@$(PYTHON) -m venv --clear .venv-reasoning-gym
	@.venv-reasoning-gym/bin/pip install --quiet --disable-pip-version-check -r requirements-reasoning-gym.txt
	@touch .venv-reasoning-gym/ready

.venv-tunix/ready: requirements.txt requirements-tunix.txt $(READY)
	@echo "Installing Tunix into .venv-tunix (once) …"
	@$(PYTHON) -m venv --clear .venv-tunix
	@.venv-tunix/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@.venv-tunix/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-tunix.txt
	@touch .venv-tunix/ready

.venv-peers/ready: requirements-peers.txt $(READY)
	@echo "Installing torch, transformers and TRL into .venv-peers (once) …"
	@$(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch .venv-peers/ready

.venv-s3/ready: requirements-s3.txt $(READY)
	@echo "Installing a server that speaks S3 into .venv-s3 (once) …"
	@$(PYTHON) -m venv --clear .venv-s3
	@.venv-s3/bin/pip install --quiet --disable-pip-version-check -r requirements-s3.txt
	@touch .venv-s3/ready

.venv/tensorboard: requirements-tensorboard.txt $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-tensorboard.txt
	@touch .venv/tensorboard

.venv-mlflow/ready: requirements.txt requirements-mlflow.txt requirements-tensorboard.txt
	@echo "Installing MLflow and TensorBoard into .venv-mlflow (once) …"
	@$(PYTHON) -m venv --clear .venv-mlflow
	@.venv-mlflow/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-mlflow.txt \
		-r requirements-tensorboard.txt
	@touch .venv-mlflow/ready

.venv-slurm/ready: requirements.txt requirements-slurm.txt
	@echo "Installing submitit into .venv-slurm (once) …"
	@$(PYTHON) -m venv --clear .venv-slurm
	@.venv-slurm/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-slurm.txt
	@touch .venv-slurm/ready

.venv-pages/ready:
	@echo "Installing html-validate and axe-core into .venv-pages (once) …"
	@npm install --silent --no-audit --no-fund --prefix .venv-pages html-validate@10.17.0 axe-core@4.14.1
	@touch .venv-pages/ready
