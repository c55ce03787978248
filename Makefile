# FiDO on Triton. `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# What is exported and served: a directory of any known layout, or a hub name. Flags as `python -m export onnx --help` lists them.
FID ?= checkpoints/fid
FIDO ?= checkpoints/fido
FID_FLAGS ?=
FIDO_FLAGS ?=
# Bounds written into the served models' configuration, as `python -m export repository --help` lists them.
LIMITS ?=
# What runs them: tensorrt, onnxruntime-gpu, onnxruntime, or auto for the fastest that this machine has.
ENGINE ?= auto
# What runs the encoder inside Triton: python, or tensorrt in NVIDIA's container (deploy/container/).
TRITON_BACKEND ?= python
# What is served, and where.
READERS ?= fid fido
STREAM ?=
SERVE_FLAGS ?=
# For `make ask`.
MODEL ?= fido
QUESTION ?= what is the capital of France?
PASSAGES ?= examples/passages.json
# Where `make perf` keeps its results; the committed ones are in perf/results/.
RUN ?= build/perf

CORPUS := build/corpus/heldout.jsonl
SERVED := model_repository/fid/1/manifest.json model_repository/fido/1/manifest.json

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv and install what every other target needs

# What tritonserver loads before all else: keeps its memory flat, and cancelled streams from stopping it. Without a C compiler it goes without.
PRELOADED := heap_trim stream_locks

$(INSTALLED): requirements.txt requirements-triton.txt requirements-export.txt requirements-dev.txt $(PRELOADED:%=serving/launcher/preload/%.c)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements-dev.txt
	$(PY) -m pip install -q --no-deps -r requirements-triton.txt
	@if command -v cc > /dev/null; then for name in $(PRELOADED); do cc -O2 -shared -fPIC -pthread -o $(VENV)/lib/lib$$name.so serving/launcher/preload/$$name.c || exit 1; done; \
	else echo "no C compiler, so without $(PRELOADED:%=serving/launcher/preload/%.c)"; fi
	@touch $@

export: $(SERVED) ## checkpoints -> ONNX engines -> model repository (FID=... FIDO=... for your own)

# Engines for a GPU are built for the limits that they will serve.
ENGINE_HERE = $(if $(filter auto,$(ENGINE)),$(shell $(PY) -m export detect),$(ENGINE))
MADE_WITH = $($(shell echo $* | tr a-z A-Z)) $($(shell echo $* | tr a-z A-Z)_FLAGS) $(ENGINE_HERE) $(if $(filter-out onnxruntime,$(ENGINE_HERE)),$(LIMITS)) $(WHOLE_ENCODER)
# Triton's own backend wants the encoder as one engine; our runtime runs its products.
WHOLE_ENCODER = $(if $(filter tensorrt,$(TRITON_BACKEND)),--whole-encoder)

# One stamp a reader holds what it is made with; it changes only when that changes, so that `make export FID=other` exports again
# and a second `make export` does nothing.
build/engines/%.made-with: $(INSTALLED) FORCE
	@mkdir -p $(@D)
	@echo '$(MADE_WITH)' | cmp -s - $@ || echo '$(MADE_WITH)' > $@

build/engines/limits.made-with: FORCE
	@mkdir -p $(@D)
	@echo '$(LIMITS) $(TRITON_BACKEND)' | cmp -s - $@ || echo '$(LIMITS) $(TRITON_BACKEND)' > $@

EXPORT_CODE := $(shell find export serving/contract -name "*.py")

build/engines/fid/manifest.json: $(INSTALLED) $(EXPORT_CODE) build/engines/fid.made-with $(wildcard $(FID)/*.json $(FID)/*.safetensors $(FID)/*.bin)
	$(PY) -m export build $(FID) $(@D) --engine $(ENGINE_HERE) $(WHOLE_ENCODER) $(FID_FLAGS) $(LIMITS)

build/engines/fido/manifest.json: $(INSTALLED) $(EXPORT_CODE) build/engines/fido.made-with $(wildcard $(FIDO)/*.json $(FIDO)/*.safetensors $(FIDO)/*.bin)
	$(PY) -m export build $(FIDO) $(@D) --engine $(ENGINE_HERE) $(WHOLE_ENCODER) $(FIDO_FLAGS) $(LIMITS)

model_repository/%/1/manifest.json: build/engines/%/manifest.json build/engines/limits.made-with
	$(PY) -m export repository $(<D) --reader $* --triton-backend $(TRITON_BACKEND) $(LIMITS)
	@touch $@

serve: export ## run Triton on the repository until Ctrl-C (READERS="fid fido", STREAM=1 for the streaming models)
	@exec $(PY) -m serving --readers $(READERS) $(if $(STREAM),--stream) $(SERVE_FLAGS)

ask: $(INSTALLED) ## ask a running server: MODEL=fido QUESTION="..." PASSAGES=file.json
	$(PY) -m clients ask --model $(MODEL) --question "$(QUESTION)" --passages $(PASSAGES)

$(CORPUS): $(INSTALLED) $(wildcard training/corpus/*.py)
	$(PY) -m training corpus
	@touch $@

demo: export $(CORPUS) ## start Triton, ask three questions of each demo reader, stop
	$(PY) -m examples.demo

evaluate: export $(CORPUS) ## EM of all demo readers through Triton on held-out and human-written questions
	$(PY) -m perf.served.accuracy

bench: export $(CORPUS) ## through Triton, in process and PyTorch beside each other, on this machine
	$(PY) -m perf.served.chain

bench-load: export $(CORPUS) ## throughput and latency at concurrency 1 to 64, and the worth of decoding in flight
	$(PY) -m perf.served.concurrency

perf: export $(CORPUS) ## FiD against FiDO by perf_analyzer, stages, peers, ablation, report, under 15 minutes (RUN=folder)
	$(PY) -m perf.bounds.rates --run $(RUN)
	$(PY) -m perf.served.sweep --run $(RUN)
	$(PY) -m perf.bounds.stages --fid $(FID) --fido $(FIDO) --run $(RUN)
	$(PY) -m perf.peers.transformers_fid --fid $(FID) --workload paper --passages 10 --passage-tokens 128 --out $(RUN)/peers.json
	$(PY) -m perf.peers.onnxruntime_engines --passages 10 --passage-tokens 128 --requests 64 --out $(RUN)/peers.json
	$(PY) -m perf.bounds.ablation --run $(RUN)
	$(PY) -m perf.report $(RUN)

# Base-size readers with random weights: what the FiDO paper measures, and what a GPU is for.
BASE := build/base
BASE_SLOTS := --slots 48
BASE_LIMITS := $(BASE_SLOTS) --encoder-batch 120
# Two processes each, so that what they do in Python goes on side by side; CUDA's multi-process service lets their kernels do so as well.
BASE_SERVED := $(BASE_LIMITS) --encoder-instances 2 --reader-instances 2 --encode-threads 16
$(BASE)/%/manifest.json: $(INSTALLED) $(EXPORT_CODE)
	$(PY) -m export preset base $(BASE)/$*.graphs --gpu $(if $(filter fido,$*),--fido) --tokenizer $(FID)/tokenizer.json
	$(PY) -m export engine $(BASE)/$*.graphs $(@D) $(BASE_LIMITS)

gpu-bench: $(BASE)/fid/manifest.json $(BASE)/fido/manifest.json ## on a GPU: the same at base size, 24 questions x 40 passages x 256 tokens (RUN=folder)
	$(PY) -m perf.bounds.rates --device gpu --run $(RUN)
	$(PY) -m perf.served.sweep --plan gpu --engines $(BASE) $(BASE_SERVED) --run $(RUN)
	$(PY) -m perf.bounds.stages --plan gpu --engines $(BASE) --batches 1 8 24 --encoder-batch 120 --run $(RUN)
	$(PY) -m perf.gpu.step $(BASE)/fido $(BASE_SLOTS) --out $(RUN)/gpu_step_fido.json
	$(PY) -m perf.gpu.step $(BASE)/fid $(BASE_SLOTS) --out $(RUN)/gpu_step_fid.json
	$(PY) -m perf.peers.transformers_fid --preset base --device cuda --requests 8 --compiled-batches 8 --out $(RUN)/peers.json
	-$(PY) -m perf.peers.onnxruntime_engines --fid $(BASE)/fid.graphs --fido $(BASE)/fido.graphs --out $(RUN)/peers.json # wants onnxruntime-gpu
	$(PY) -m perf.bounds.ablation --batches 1 24 --prebuilt base:1:12=$(BASE)/fid base:6:1=$(BASE)/fido --memory-gb 120 --run $(RUN)
	$(PY) -m perf.report $(RUN)

# Decoders much larger than encoders, at 100 passages, beside the FiD reader that such a decoder would be weighed against.
LARGE_LIMITS := --slots 8 --encoder-batch 120
LARGE_FLAGS := $(LARGE_LIMITS) --passages 100 --concurrency 16 --questions 64 --alone 8 --rounds 2
build/large/%/manifest.json: $(INSTALLED) $(EXPORT_CODE)
	$(PY) -m export preset $* build/large/$*.graphs --gpu $(if $(findstring -,$*),--fido) --tokenizer $(FID)/tokenizer.json
	$(PY) -m export engine build/large/$*.graphs $(@D) $(LARGE_LIMITS) --max-passages 100

gpu-bench-large: $(foreach size,large base-xl large-xxl,build/large/$(size)/manifest.json) ## on a GPU: FiD-large, and FiDO base-XL and large-XXL
	$(PY) -m perf.gpu.chain --fid build/large/large --fido build/large/base-xl $(LARGE_FLAGS) --out $(RUN)/gpu_chain_large_and_base_xl.json
	$(PY) -m perf.gpu.chain --fido build/large/large-xxl $(LARGE_FLAGS) --out $(RUN)/gpu_chain_large_xxl.json

# the ablation's rows: decoder, period of cross-attention, key/value heads
ROWS := base-1-12 base-6-12 base-1-1 base-6-1 base-2-1 base-3-1 base-12-1 base-6-4 xl-1-32 xl-6-32 xl-1-1 xl-6-1
of_row = $(word $(1),$(subst -, ,$*))
build/ablation/%/manifest.json: $(INSTALLED) $(EXPORT_CODE)
	$(PY) -m export preset $(if $(filter xl-%,$*),base-xl,base) build/ablation/$*.graphs --gpu --period $(call of_row,2) --num-kv-heads $(call of_row,3) --tokenizer $(FID)/tokenizer.json
	$(PY) -m export engine build/ablation/$*.graphs $(@D) --slots 24 --encoder-batch 120

gpu-ablation: $(ROWS:%=build/ablation/%/manifest.json) ## on a GPU, after gpu-bench: every row of the ablation (tens of GB of disk, 60 GB of GPU memory)
	$(PY) -m perf.bounds.ablation --batches 1 24 --prebuilt $(foreach row,$(ROWS),$(subst -,:,$(row))=build/ablation/$(row)) --memory-gb 120 --run $(RUN)

report: $(INSTALLED) ## HTML page, Markdown summary and summary.json of every run in perf/results
	$(PY) -m perf.report

stress: export $(CORPUS) ## faults and fuzz against the real server, about 10 minutes (STRESS_MINUTES=60 soaks)
	$(PY) -m tests.stress $(if $(STRESS_MINUTES),--minutes $(STRESS_MINUTES))

gpu-test: export $(CORPUS) ## on a GPU: engines, kernels, decoder and the six served models against fp32 on the CPU
	$(PY) -m export onnx $(FID) build/cpu_engines/fid $(FID_FLAGS)
	$(PY) -m export onnx $(FIDO) build/cpu_engines/fido $(FIDO_FLAGS)
	$(PY) -m tests.gpu

test: ENGINE := onnxruntime
test: export $(CORPUS) ## all tests that need no GPU
	$(PY) -m pytest

lint: $(INSTALLED) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .

clean: ## remove everything that was built, and the environment
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find model_repository -path '*/1/*' ! -name model.py -type f -delete

FORCE:
.PHONY: help setup export serve ask demo evaluate bench bench-load perf gpu-bench gpu-bench-large gpu-ablation report stress gpu-test test lint clean FORCE
