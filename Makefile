# Two commands do everything on a fresh Debian 12 machine, as root: `make demo` and `make test`.
# Both install what they need: the Debian packages named here and, into .venv, the Python packages
# that constraints.txt pins with their hashes.

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := busybox-static catatonit conmon etcd-server etcd-client ethtool gcc iperf3 iproute2 \
	iputils-ping libc6-dev nftables openssl procps python3-venv runc tcpdump util-linux zstd
BENCH_PACKAGES := fastd wireguard-go wireguard-tools
PUBLISHED_PACKAGES := docker.io
SETUP := $(VENV)/.ready
SCALE := build/scale.json
DATAPATH := build/datapath.json
PUBLISHED := build/published.json

.PHONY: demo test native fuzz lint type bench bench-scale bench-datapath bench-published setup \
	constraints clean

demo: $(SETUP)  ## three hosts, two networks, packets between them
	$(BIN)/python examples/demo.py

test: native  ## all tests
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest -n 2

native: $(SETUP)  ## the userspace VTEP's engine in C, for --vtep-engine native
	@$(BIN)/python -m meshnet.vtep.native

MINUTES := 3
fuzz: $(SETUP)  ## campaigns of hostile input, MINUTES in all
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.hostile --minutes $(MINUTES)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(SETUP)
	$(BIN)/mypy

bench: $(SETUP)  ## ratios against the named peers
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.bench

bench-scale: $(VENV)/.bench  ## one agent among 30,000 hosts, 50 agents, hosts that change; a picture
	mkdir -p $(dir $(SCALE))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.bench \
	  scale busy convergence churn --json $(SCALE)
	$(BIN)/python -m tests.bench.plot $(SCALE) docs/images/scale.png

bench-datapath: $(VENV)/.bench  ## TCP, small packets, ping and CPU, tunnel beside tunnel; a picture
	$(call install,$(BENCH_PACKAGES))
	mkdir -p $(dir $(DATAPATH))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.bench datapath --json $(DATAPATH)
	$(BIN)/python -m tests.bench.plot_datapath $(DATAPATH) docs/images/datapath.png

bench-published: $(SETUP)  ## ten published ports beside those of Docker's own network
	$(call install,$(PUBLISHED_PACKAGES))
	mkdir -p $(dir $(PUBLISHED))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.bench published --json $(PUBLISHED)

setup: $(SETUP)

# Installs those of some Debian packages that are missing; says which.
define install
@missing=; for package in $(1); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	    || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing \
	    >$${TMPDIR:-/tmp}/meshnet-apt.log 2>&1 || { tail -5 $${TMPDIR:-/tmp}/meshnet-apt.log; exit 1; }; fi
endef

$(SETUP): pyproject.toml constraints.txt Makefile
	$(call install,$(PACKAGES))
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@echo "installing the Python packages of constraints.txt"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Only the pictures of benchmarks need matplotlib: not in what tests and demo install.
$(VENV)/.bench: $(SETUP) constraints-bench.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r constraints-bench.txt
	@touch $@

COMPILE := $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --no-header

constraints: $(SETUP)  ## resolve the versions anew
	$(COMPILE) --extra dev --output-file constraints.txt pyproject.toml
	$(COMPILE) --extra bench --constraint constraints.txt --output-file constraints-bench.txt \
	  pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info
