"""Where endpoints' addresses come from: this host's subnets, or a pool of all hosts."""
