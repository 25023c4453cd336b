# `make demo` and `make test` do their own set-up: a virtual environment in .venv, made once and made anew when pyproject.toml,
# constraints.txt or this file changes, when the checkout has moved, or when an earlier set-up was interrupted.
# Another interpreter: `make clean`, then for example `make demo PYTHON=python3.13`.

PYTHON ?=
INTERPRETERS := $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3)
STAMP := .venv/complete

# Written last, and read by the environment's own interpreter: wrong after an interruption, a move, a copy, or when that interpreter is gone.
ifneq ($(shell .venv/bin/python -c 'print(open("$(STAMP)").read())' 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: demo test lint clean

demo: $(STAMP)
	.venv/bin/python -m subbyte.tasks.demo

test: $(STAMP)
	.venv/bin/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint: $(STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# Interpreters are tried by running them: a pyenv shim may exist for a version that is not active.
$(STAMP): pyproject.toml constraints.txt Makefile
	@for python in $(INTERPRETERS); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Setting up .venv with $$python (once; takes a few minutes)"; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo 'error: none of $(INTERPRETERS) runs as Python 3.11 or later with venv and ensurepip.' >&2; \
	echo 'Install one (Debian, Ubuntu: python3 and python3-venv), or name it: make demo PYTHON=/path/to/python3' >&2; \
	exit 1
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,demo,images,onnx,openvino,hf,compressed-tensors]'
	@printf '%s\n' "$$(pwd -P)" > $(STAMP)

clean:
	rm -rf .venv build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
