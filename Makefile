# Plain `make` says what there is. Everything works from a fresh clone; `setup` runs by itself where it is needed.

CARGO ?= cargo

.PHONY: help setup demo demo-fp8 test lint

help:
	@echo 'make demo      set up, build, and let the bundled model write text and show its experts'
	@echo 'make demo-fp8  the same with the model in FP8'
	@echo 'make test      set up and run all tests'
	@echo 'make lint      formatting, clippy and shellcheck'
	@echo 'make setup     look for what building and running need; install a software Vulkan driver if there is none'

setup:
	@scripts/setup

demo demo-fp8: setup
	$(CARGO) build --release --locked
	@scripts/demo $(if $(filter demo-fp8,$@),--fp8)

# Mesa's device-select layer complains about a missing XDG_RUNTIME_DIR, once for each test; the tests pick devices themselves.
test: export NODEVICE_SELECT = 1
test:
	@scripts/setup --tests
	@CARGO=$(CARGO) scripts/test

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if command -v shellcheck >/dev/null; then shellcheck $$(grep -l '^#!.*bash' scripts/*) .ci/run; \
	else echo 'shellcheck is not installed: the scripts were not checked'; fi
