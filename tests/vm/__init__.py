"""The product on real machines: Debian 12 under QEMU, with its own kernel, systemd and cgroup v2.

``make test-vm`` runs them; `make test` does not, since they take the better part of an hour.
"""
