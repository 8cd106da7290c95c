# A fresh machine needs Python 3.10 or newer with venv, make and two minutes; everything else lands in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ZOO := .venv/.zoo
PEERS := .venv/.peers
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Plain PyPI gives Linux a CUDA build of several GB; the tests and the demo need the CPU one.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO := runs/demo


.PHONY: demo test bench bench-distill bench-evidence bench-quant bench-structured bench-sparsity bench-weights-file zoo lint format clean

demo: $(READY)
	@if [ -e $(DEMO) ]; then \
	  old=$(DEMO)-before-$$(date +%Y%m%d-%H%M%S); mv $(DEMO) $$old; echo "The demo's earlier run is kept in $$old"; fi
	$(BIN)/tersor compress digits -o $(DEMO)
	@echo
	@echo "Look at   $(DEMO)/report.html    (a browser opens it, no network needed)"
	@echo "Numbers   $(DEMO)/summary.json"
	@echo "Ship      $(DEMO)/model.onnx"
	@echo "Check     $(BIN)/tersor load-check $(DEMO)"

# One thread for each worker: two that spin on the same cores take ten times as long.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each benchmark prints its table and writes it to docs/benchmarks/.
bench: $(READY)
	@mkdir -p docs/benchmarks
	@for file in benchmarks/digits.py benchmarks/fashion.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# Prunes about 190 models, each in its own process, and writes docs/coverage.md; hours on two cores. It resumes where it
# was stopped; options through ARGS, such as: make zoo ARGS="--suite timm --only 'swin*' --no-peer"
zoo: $(ZOO)
	$(BIN)/python -m benchmarks.zoo $(ARGS)

# Structured pruning beside Torch-Pruning: accuracy on CIFAR-10, accuracy against latency on Fashion-MNIST, the time that
# grouping takes. About half an hour on two quiet cores; it resumes where it was stopped. On a GPU, for instance:
# make bench-structured CIFAR="--model resnet56 --device cuda --epochs 60 --seeds 3"
bench-structured: $(ZOO)
	$(BIN)/python -m benchmarks.structured.grouping $(GROUPING)
	$(BIN)/python -m benchmarks.structured.latency $(LATENCY)
	$(BIN)/python -m benchmarks.structured.cifar $(CIFAR)

# Zeros: one shot, repair, SparseGPT and gradual pruning on Fashion-MNIST and CIFAR-10, five seeds, beside torch's own.
# About an hour on two quiet cores; it resumes where it was stopped. Less: make bench-sparsity SPARSITY="--models fashion"
bench-sparsity: $(READY)
	$(BIN)/python -m benchmarks.sparsity $(SPARSITY)

# Distillation on Fashion-MNIST: a student alone and taught, with and without the cache, five seeds; what an epoch costs.
# Under an hour on two quiet cores; it resumes where it was stopped. Less: make bench-distill DISTILL="--seeds 1 --epochs 1"
bench-distill: $(READY)
	$(BIN)/python -m benchmarks.distill $(DISTILL)

# Quantisation: speed of usual architectures, accuracy on Fashion-MNIST and CIFAR-10, beside onnxruntime's own, torchao
# and neural-compressor. Speed wants a quiet machine. Less: make bench-quant QUANT="--parts speed"
bench-quant: $(ZOO) $(PEERS)
	$(BIN)/python -m benchmarks.quant $(QUANT)

# Evidence: whether intervals hold and tests do not cry wolf, by simulation; whether benchmarks tell models apart (that
# wants a quiet machine, and ten minutes). Both resume where they were stopped. Less: make bench-evidence VERDICTS="--runs 10"
bench-evidence: $(READY)
	$(BIN)/python -m benchmarks.evidence $(EVIDENCE)
	$(BIN)/python -m benchmarks.evidence_latency $(VERDICTS)

# Prunes a generated weights file of 4 GiB: peak memory and time. Minutes, and 8 GiB of disk while it runs.
bench-weights-file: $(READY)
	$(BIN)/python -m benchmarks.weights_file $(WEIGHTS)

clean:
	rm -rf .venv build dist *.egg-info .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; this is $$($(PYTHON) --version). Say: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "Installing into .venv (once) ..."
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null \
	  || $(BIN)/pip install --quiet --quiet --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(BIN)/pip install --quiet --quiet --no-deps --index-url $(TORCH_INDEX) "torch==$(TORCH)"
	$(BIN)/pip install --quiet --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

# Without their dependencies: these would replace the CPU build of torch by one of several GB.
$(ZOO): $(READY)
	$(BIN)/pip install --quiet --quiet --no-deps -c constraints.txt torchvision timm
	$(BIN)/pip install --quiet --quiet -c constraints.txt -e '.[dev,zoo]'
	@touch $(ZOO)

# Without their dependencies, as above; what neural-compressor imports beside torch comes after.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --quiet --no-deps torchao==0.18.0 neural-compressor==3.10
	$(BIN)/pip install --quiet --quiet -c constraints.txt prettytable py-cpuinfo schema
	@touch $(PEERS)
