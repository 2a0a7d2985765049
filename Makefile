# Two commands do everything on a fresh Debian 12 machine, as root: `make demo` and `make test`.
# Both install what they need: the Debian packages named here and, into .venv, the Python packages
# that constraints.txt pins with their hashes.

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := busybox-static catatonit conmon etcd-server etcd-client ethtool gcc iperf3 iproute2 \
	iputils-ping libc6-dev libseccomp2 nftables openssl procps python3-venv runc tcpdump \
	util-linux zstd
# Makers of images, a registry, other firewalls and a systemd: about 90 MB to fetch. Their services are not needed.
TEST_PACKAGES := buildah docker-registry docker.io iptables skopeo systemd umoci
VM_PACKAGES := e2fsprogs mmdebstrap openssh-client qemu-system-x86 qemu-utils
BENCH_PACKAGES := fastd wireguard-go wireguard-tools
PUBLISHED_PACKAGES := docker.io
BENCH_RUN_PACKAGES := crun docker.io podman
DEB_PACKAGES := binutils gcc libc6-dev python3-venv xz-utils
TEST_DEB_PACKAGES := mmdebstrap
SETUP := $(VENV)/.ready
SCALE := build/scale.json
DATAPATH := build/datapath.json
PUBLISHED := build/published.json
RUN := build/run.json
SOAK := build/soak.json

.PHONY: demo test test-deb test-vm test-many deb native fuzz faults soak hardening lint type bench \
	bench-scale bench-datapath bench-published bench-run setup constraints clean

demo: $(SETUP)  ## three hosts, two networks, packets between them
	$(BIN)/python examples/demo.py

test: native  ## all tests
	$(call install,$(TEST_PACKAGES))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest -n 4

test-vm: deb  ## the product on real machines: Debian 12 under QEMU; the better part of an hour
	$(call install,$(VM_PACKAGES))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest -q --durations=10 tests/vm

CONTAINERS := 100
test-many: $(SETUP)  ## CONTAINERS at once on one host, and what they leave: nothing
	PATH=$(CURDIR)/$(BIN):$$PATH MESHNET_CONTAINERS=$(CONTAINERS) $(BIN)/python -m pytest \
	  tests/netns/test_run_many.py -k side_by_side

native: $(SETUP)  ## the userspace VTEP's engine in C, for --vtep-engine native
	@$(BIN)/python -m meshnet.vtep.native

deb: $(SETUP)  ## build/meshnet_VERSION_ARCH.deb
	$(call install,$(DEB_PACKAGES))
	agent/packaging/build $(VENV)

test-deb: deb  ## installs, upgrades, removes and purges the package in a Debian of its own
	$(call install,$(TEST_DEB_PACKAGES))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/deb

MINUTES := 3
fuzz: $(VENV)/.fuzz  ## campaigns of hostile input, MINUTES for most of them and MINUTES for the API
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.hostile --minutes $(MINUTES)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.hostile.openapi --minutes $(MINUTES)

hardening: $(SETUP)  ## the agent confined as by its unit, and with each capability taken away
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.netns.systemd_unit.exercise

SEQUENCES := 200
faults: $(SETUP)  ## random sequences of ten faults, SEQUENCES of them; a table
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.netns.faults \
	  --count $(SEQUENCES) --jobs 2 --etcd-members 0

SOAK_MINUTES := 20
soak: $(VENV)/.bench  ## faults and churn for SOAK_MINUTES, and whether anything grows; a picture
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.netns.faults.soak \
	  --minutes $(SOAK_MINUTES) --json $(SOAK); status=$$?; \
	  $(BIN)/python -m tests.netns.faults.plot $(SOAK) docs/images/soak.png && exit $$status

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

bench-run: $(SETUP)  ## the time of meshnet run beside docker run and podman run
	$(call install,$(BENCH_RUN_PACKAGES))
	mkdir -p $(dir $(RUN))
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tests.bench run --json $(RUN)

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

# Only campaigns need schemathesis.
$(VENV)/.fuzz: $(SETUP) constraints-fuzz.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r constraints-fuzz.txt
	@touch $@

COMPILE := $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --no-header

constraints: $(SETUP)  ## resolve the versions anew
	$(COMPILE) --extra dev --output-file constraints.txt pyproject.toml
	$(COMPILE) --constraint constraints.txt --output-file constraints-runtime.txt pyproject.toml
	for extra in bench fuzz; do \
	  $(COMPILE) --extra $$extra --constraint constraints.txt \
	    --output-file constraints-$$extra.txt pyproject.toml || exit; done

clean:
	rm -rf $(VENV) build dist *.egg-info
