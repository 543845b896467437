# The doors of this repository. Each target first sees to what it needs; the work itself is in `cargo xtask`.
# Run them as root: the demo and the last ring of tests make network namespaces.

.PHONY: build demo test lint bench soak image deps

build: deps
	cargo build --release

# From `kubectl apply` to a packet, on three nodes. Arguments: make demo DEMO="--proxy-mode iptables", or DEMO=--standalone
# for a server and agents by themselves.
demo: build image
	cargo xtask demo $(DEMO)

# Few random cases per property test here, many in `make soak`. What needs another kernel runs in an emulated machine.
test: deps image
	FAIRLEAD_CASES=$${FAIRLEAD_CASES:-50} cargo test --workspace
	cargo xtask guest

lint: deps
	cargo xtask lint

# Arguments: make bench BENCH="up pods"
bench: build image
	cargo xtask bench $(BENCH)

soak: deps image
	cargo xtask soak

image: deps
	cargo xtask image

# Without a linker there is no xtask to do the rest.
deps:
	@command -v cc >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev; }
	@cargo xtask deps
