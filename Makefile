# FiDO on Triton. `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:

# ---- Settings: NAME=value on make's command line ----

PYTHON ?= python3
# Ray has an environment of its own.
VENV ?= $(if $(filter offline,$(FOR)),.venv-offline,.venv)

# Readers to export: a checkpoint directory of any known layout, or a hub name. `make export FID=path` exports fid alone.
FID ?= checkpoints/fid
FIDO ?= checkpoints/fido
# A reader of another name: make export READER=nq CHECKPOINT=path
READER ?=
CHECKPOINT ?=
# Options of each checkpoint, as `python -m export onnx --help` lists them.
FID_FLAGS ?=
FIDO_FLAGS ?=
READER_FLAGS ?=
# Bounds of the served models, as `python -m export readers --help` lists them.
LIMITS ?=
# Engine of the readers: tensorrt, onnxruntime-gpu, openvino, onnxruntime, or auto for the fastest that this machine can run.
ENGINE ?= auto
# On a GPU: gemms, with our kernels between them, or whole: one engine each for encoder, cross_kv and decoder_step, without our kernels.
GRAPHS ?= gemms
# Precision of the engine: fp32, bf16 or int8 (both openvino) on a CPU, fp16 or bf16 on a GPU; empty: fp32 on a CPU, fp16 on a GPU.
PRECISION ?=
# Questions and passages, JSON lines, that int8 is calibrated on.
SAMPLES ?=
# Triton backend of the encoder: python, or tensorrt in NVIDIA's container (deploy/container/).
TRITON_BACKEND ?= python

# Readers to serve, by blanks or commas; empty = all that were exported. DEMO=1 serves the demo readers.
READERS ?=
DEMO ?=
STREAM ?=
SERVE_FLAGS ?=
# Several servers behind one address: one for each of these GPUs (0,1 or all), or so many on the CPU.
GPUS ?=
REPLICAS ?=

# The question of `make ask`.
MODEL ?= fido
QUESTION ?= what is the capital of France?
PASSAGES ?= examples/passages.json

# Results of `make perf`. The committed ones are in perf/results/.
RUN ?= build/perf
STRESS_MINUTES ?=

# ---- Typed values reach the shell through the environment: "$$NAME" is safe with spaces, quotes and dollars ----

TYPED := FID FIDO READER CHECKPOINT FID_FLAGS FIDO_FLAGS READER_FLAGS SAMPLES MODEL QUESTION PASSAGES RUN
# `value` keeps make from expanding a dollar. The origin is "command line" or "environment" where the user typed the value.
$(foreach name,$(TYPED),$(eval ORIGIN_$(name) := $$(origin $(name)))$(eval override $(name) := $$(value $(name)))$(eval export $(name)))
is_typed = $(filter command environment,$(ORIGIN_$(1)))

PY := $(VENV)/bin/python
CORPUS := build/corpus/heldout.jsonl
EXPORT_CODE = $(shell find export serving/contract -name "*.py")

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- Set-up: a task installs what it needs (deploy/set_up.py) ----

FOR ?= serve
setup: $(VENV)/.$(FOR) ## make .venv for a task: FOR=serve (no torch), export, evaluate, openvino, frameworks, offline or dev

SERVE := $(VENV)/.serve
EXPORT_READY := $(VENV)/.export
EVALUATE := $(VENV)/.evaluate
DEV := $(VENV)/.dev
SET_UP = @$(PYTHON) deploy/set_up.py --venv $(VENV)
$(SERVE): requirements.txt requirements-triton.txt $(wildcard serving/launcher/preload/*.c)
	$(SET_UP) serve
$(EXPORT_READY): requirements-export.txt $(SERVE)
	$(SET_UP) export
$(EVALUATE): requirements-evaluate.txt $(SERVE)
	$(SET_UP) evaluate
$(VENV)/.openvino: requirements-openvino.txt $(SERVE)
	$(SET_UP) openvino
$(VENV)/.offline: requirements-offline.txt $(SERVE)
	$(SET_UP) offline
$(VENV)/.frameworks: requirements-frameworks.txt $(EVALUATE)
	$(SET_UP) frameworks
$(DEV): requirements-dev.txt $(EXPORT_READY) $(EVALUATE) $(VENV)/.openvino
	$(SET_UP) dev

# ---- Export and serving ----

# NAME=CHECKPOINT of each reader that the user named. Without a name `make export` brings up to date what was exported before,
# or exports the demo readers the first time.
NAMED = $(strip $(if $(call is_typed,FID),"fid=$$FID") $(if $(call is_typed,FIDO),"fido=$$FIDO") $(if $(READER)$(CHECKPOINT),"$$READER=$$CHECKPOINT"))
BOTH := "fid=$$FID" "fido=$$FIDO"
flags_of = $(if $(findstring "$(1)=,$(2)),$(if $($(3)),--flags "$(1)=$$$(3)"))
flags = $(call flags_of,fid,$(1),FID_FLAGS) $(call flags_of,fido,$(1),FIDO_FLAGS) $(call flags_of,$$READER,$(1),READER_FLAGS)
EXPORT = $(PY) -m export readers
EXPORT_OPTIONS = --engine $(ENGINE) --graphs $(GRAPHS) $(if $(PRECISION),--precision $(PRECISION)) $(if $(SAMPLES),--samples "$$SAMPLES") \
	--triton-backend $(TRITON_BACKEND) $(LIMITS)

export: $(EXPORT_READY) ## checkpoints -> engines -> model repository (READER=name CHECKPOINT=path; FID=path, FIDO=path)
	@$(EXPORT) $(or $(NAMED),--default $(BOTH)) $(call flags,$(or $(NAMED),$(BOTH))) $(EXPORT_OPTIONS)

# The demo, tests and benchmarks keep their readers in a place of their own and never touch what a user exported.
PLACE := build/demo
demo-readers: $(SERVE)
	@$(EXPORT) $(BOTH) $(call flags,$(BOTH)) --engines $(PLACE)/engines --repository $(PLACE)/model_repository $(EXPORT_OPTIONS)

serve: $(if $(DEMO),demo-readers,$(if $(NAMED),export,$(SERVE))) ## run Triton on what was exported until Ctrl-C (READERS="a b", STREAM=1, DEMO=1, GPUS=0,1)
	@exec $(PY) -m serving --readers $(READERS) $(if $(DEMO),--repository $(PLACE)/model_repository) $(if $(STREAM),--stream) $(if $(GPUS),--gpus "$(GPUS)") $(if $(REPLICAS),--replicas $(REPLICAS)) $(SERVE_FLAGS)

status: $(SERVE) ## what is exported and what is served: checkpoint, parameters, engine, precision, limits
	@$(PY) -m serving --status --readers $(READERS) $(if $(DEMO),--repository $(PLACE)/model_repository)

ask: $(SERVE) ## ask a running server: MODEL=fido QUESTION="..." PASSAGES=file.json
	@$(PY) -m clients ask --model "$$MODEL" --question "$$QUESTION" --passages "$$PASSAGES"

$(CORPUS): $(EVALUATE) $(wildcard training/corpus/*.py)
	$(PY) -m training corpus
	@touch $@

demo: demo-readers ## start Triton, ask three questions of each demo reader, stop
	$(PY) -m examples.demo

PLAY_PORT ?= 8080
play: $(EVALUATE) demo-readers ## a page that asks FiD and FiDO side by side, and OpenAI's API, until Ctrl-C (PLAY_PORT=8080)
	@exec $(PY) -m examples.playground --port $(PLAY_PORT)

evaluate: $(EVALUATE) demo-readers $(CORPUS) ## EM of all demo readers through Triton on held-out and human-written questions
	$(PY) -m perf.served.accuracy

# ---- Measurement on a CPU ----

bench: $(DEV) demo-readers $(CORPUS) ## Triton, in process and PyTorch compared on this machine
	$(PY) -m perf.served.chain
	$(PY) -m perf.peers.cpu_engines

bench-load: $(DEV) demo-readers $(CORPUS) ## throughput and latency at concurrency 1 to 64, and the gain of in-flight batching
	$(PY) -m perf.served.concurrency

perf: $(DEV) demo-readers $(CORPUS) ## FiD against FiDO by perf_analyzer, stages, peers, ablation, report, under 15 minutes (RUN=folder)
	$(PY) -m perf.bounds.rates --run "$$RUN"
	$(PY) -m perf.served.sweep --run "$$RUN"
	$(PY) -m perf.bounds.stages --fid "$$FID" --fido "$$FIDO" --run "$$RUN"
	$(PY) -m perf.peers.transformers_fid --fid "$$FID" --workload paper --passages 10 --passage-tokens 128 --out "$$RUN/peers.json"
	$(PY) -m perf.peers.onnxruntime_engines --passages 10 --passage-tokens 128 --requests 64 --out "$$RUN/peers.json"
	$(PY) -m perf.bounds.ablation --run "$$RUN"
	$(PY) -m perf.report "$$RUN"

report: $(DEV) ## HTML page, Markdown summary and summary.json of every run in perf/results
	$(PY) -m perf.report

# ---- Measurement on a GPU ----

# Base-size readers with random weights, the sizes of the FiDO paper.
BASE := build/base
BASE_SLOTS := --slots 48
BASE_LIMITS := $(BASE_SLOTS) --encoder-batch 120
# What `make export` chooses on 16 cores: several processes of each model, so that their Python code runs in parallel. The bytes keep FiD's
# keys and values, unary and streaming, within 80 GB.
BASE_SERVED := --slots 32 --encoder-batch 120 --encoder-instances 2 --reader-instances 3 --encode-threads 16 --kv-cache-bytes 9000000000
BASE_READER = $(if $(filter fido,$*),--fido) --tokenizer "$$FID/tokenizer.json"
$(BASE)/%/manifest.json: $(DEV) $(EXPORT_CODE)
	$(PY) -m export preset base $(BASE)/$*.graphs --gpu --encoder-kernels auto $(BASE_READER)
	$(PY) -m export engine $(BASE)/$*.graphs $(@D) $(BASE_LIMITS)
$(BASE)/fp8/%/manifest.json: $(DEV) $(EXPORT_CODE)
	$(PY) -m export preset base $(BASE)/fp8/$*.graphs --gpu --encoder-kernels auto --encoder-precision float8 $(BASE_READER)
	$(PY) -m export engine $(BASE)/fp8/$*.graphs $(@D) $(BASE_LIMITS)

BASE_STAGES := --batches 1 8 24 --encoder-batch 120
BASE_ENGINES := $(foreach folder,$(BASE) $(BASE)/fp8,$(folder)/fid/manifest.json $(folder)/fido/manifest.json)
gpu-bench: $(BASE_ENGINES) ## on a GPU: `make perf` at base size, fp16, FP8 and the strongest peers, 24 questions x 40 passages x 256 tokens (RUN=folder)
	$(PY) -m perf.bounds.rates --device gpu --run "$$RUN"
	-$(PY) -m perf.peers.library --out "$$RUN/library_pytorch.json" # its rows of library kernels need requirements-kernels.txt
	$(PY) -m perf.served.sweep --plan gpu --engines $(BASE) $(BASE_SERVED) --run "$$RUN"
	$(PY) -m perf.served.sweep --plan paper --engines $(BASE)/fp8 --variant fp8 $(BASE_SERVED) --run "$$RUN"
	$(PY) -m perf.bounds.stages --plan gpu --engines $(BASE) $(BASE_STAGES) --run "$$RUN"
	$(PY) -m perf.bounds.stages --plan gpu --engines $(BASE)/fp8 --variant fp8 $(BASE_STAGES) --run "$$RUN"
	$(PY) -m perf.gpu.step $(BASE)/fido $(BASE_SLOTS) --out "$$RUN/gpu_step_fido.json"
	$(PY) -m perf.gpu.step $(BASE)/fid $(BASE_SLOTS) --out "$$RUN/gpu_step_fid.json"
	$(PY) -m perf.peers.transformers_fid --preset base --device cuda --requests 8 --compiled-batches 8 --out "$$RUN/peers.json"
	-$(PY) -m perf.peers.onnxruntime_engines --fid $(BASE)/fid.graphs --fido $(BASE)/fido.graphs --out "$$RUN/peers.json" # needs onnxruntime-gpu
	$(PY) -m perf.bounds.ablation --batches 1 24 --prebuilt base:1:12=$(BASE)/fid base:6:1=$(BASE)/fido --memory-gb 120 --run "$$RUN"
	$(PY) -m perf.report "$$RUN"

# Decoders much larger than their encoders, at 100 passages, and the FiD reader to compare them with.
LARGE_LIMITS := --slots 8 --encoder-batch 120
LARGE_FLAGS := $(LARGE_LIMITS) --passages 100 --concurrency 16 --questions 64 --alone 8 --rounds 2
build/large/%/manifest.json: $(DEV) $(EXPORT_CODE)
	$(PY) -m export preset $* build/large/$*.graphs --gpu $(if $(findstring -,$*),--fido) --tokenizer "$$FID/tokenizer.json"
	$(PY) -m export engine build/large/$*.graphs $(@D) $(LARGE_LIMITS) --max-passages 100

gpu-bench-large: $(foreach size,large base-xl large-xxl,build/large/$(size)/manifest.json) ## on a GPU: FiD-large, and FiDO base-XL and large-XXL
	$(PY) -m perf.gpu.chain --fid build/large/large --fido build/large/base-xl $(LARGE_FLAGS) --out "$$RUN/gpu_chain_large_and_base_xl.json"
	$(PY) -m perf.gpu.chain --fido build/large/large-xxl $(LARGE_FLAGS) --out "$$RUN/gpu_chain_large_xxl.json"

# The ablation's rows: decoder, period of cross-attention, key/value heads.
ROWS := base-1-12 base-6-12 base-1-1 base-6-1 base-2-1 base-3-1 base-12-1 base-6-4 xl-1-32 xl-6-32 xl-1-1 xl-6-1
of_row = $(word $(1),$(subst -, ,$*))
row_preset = $(if $(filter xl-%,$*),base-xl,base) build/ablation/$*.graphs --period $(call of_row,2) --num-kv-heads $(call of_row,3)
build/ablation/%/manifest.json: $(DEV) $(EXPORT_CODE)
	$(PY) -m export preset $(row_preset) --gpu --tokenizer "$$FID/tokenizer.json"
	$(PY) -m export engine build/ablation/$*.graphs $(@D) --slots 24 --encoder-batch 120

PREBUILT = $(foreach row,$(ROWS),$(subst -,:,$(row))=build/ablation/$(row))
gpu-ablation: $(ROWS:%=build/ablation/%/manifest.json) ## on a GPU, after gpu-bench: every row of the ablation (tens of GB of disk, 60 GB of GPU memory)
	$(PY) -m perf.bounds.ablation --batches 1 24 --prebuilt $(PREBUILT) --memory-gb 120 --run "$$RUN"

# ---- Up-training (docs/training.md) ----

# Small enough for a CPU: it shows every part, and EM rises from 0. The table of checkpoints/README.md is of a GPU (training/ablation.py).
DEMO_TRAINING := build/uptrain
uptrain-demo: $(DEV) $(CORPUS) ## up-train the demo's FiD reader to FiDO for minutes on a CPU, and export it (a GPU: python -m training.ablation)
	$(PY) -m training fid-data --corpus $(dir $(CORPUS)) --out $(DEMO_TRAINING)/train.jsonl --examples 1000 --n-passages 3
	$(PY) -m training uptrain "$$FID" $(DEMO_TRAINING)/train.jsonl --out $(DEMO_TRAINING)/fido --period 2 --num-kv-heads 1 \
	  --dev $(CORPUS) --dev-questions 60 --n-passages 3 --steps 60 --batch-questions 12 --micro-questions 12 --warmup-steps 6 \
	  --learning-rate 1e-3 --embedding-rate 5 --query-rate 0.177 --ema 0.9 --evaluate-every 30 --log-every 10 --save-every 30 \
	  --device cpu --threads 1 --save-dtype float16
	$(PY) -m export onnx $(DEMO_TRAINING)/fido $(DEMO_TRAINING)/engines

# ---- Tests ----

test: ENGINE := onnxruntime
test: $(DEV) demo-readers $(CORPUS) ## all tests that need no GPU
	$(PY) -m pytest

stress: $(DEV) demo-readers $(CORPUS) ## faults and fuzz against the real server, about 10 minutes (STRESS_MINUTES=60 soaks)
	$(PY) -m tests.stress $(if $(STRESS_MINUTES),--minutes $(STRESS_MINUTES))

storm: $(DEV) demo-readers $(CORPUS) ## clients that leave, 20,000 of all kinds, on busy cores, about 25 minutes (STORM="--left 2000")
	$(PY) -m tests.stress.storm $(STORM)

gpu-test: $(DEV) demo-readers $(CORPUS) ## on a GPU: engines, kernels, decoder and the six served models against fp32 on the CPU
	$(PY) -m export onnx "$$FID" build/cpu_engines/fid $(FID_FLAGS)
	$(PY) -m export onnx "$$FIDO" build/cpu_engines/fido $(FIDO_FLAGS)
	$(PY) -m tests.gpu

container-test: $(DEV) ## as root, with podman and debootstrap: build the plain container without a registry, run it, ask it, stop it
	$(PY) -m pytest -m container tests/deploy

cluster-test: ENGINE := onnxruntime
cluster-test: $(DEV) demo-readers ## as root on Debian 12: the chart on two Kubernetes nodes under load, 12 minutes; more the first time
	$(PY) -m tests.cluster $(CLUSTER)

gpu-check: $(EXPORT_READY) $(EVALUATE) $(CORPUS) ## on a GPU: does it serve? card, TensorRT, Triton, engines, parity, questions/s, on one screen
	@$(PY) -m perf.gpu.check --graphs $(GRAPHS)

mutants: $(DEV) ## change the code in one place at a time: do the fast tests notice? about 20 minutes
	$(PY) -m tests.mutants

lint: $(DEV) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .

clean: ## remove everything that was built, and the environment
	rm -rf build $(VENV) .venv-offline .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find model_repository -mindepth 1 ! -name README.md -delete

.PHONY: help setup export demo-readers serve status ask demo play evaluate bench bench-load perf report gpu-bench gpu-bench-large gpu-ablation uptrain-demo test stress storm gpu-test gpu-check container-test cluster-test mutants lint clean
