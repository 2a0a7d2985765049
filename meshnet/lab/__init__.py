"""Hosts as network namespaces on one machine: ``meshnet lab`` and the tests' fixture.

The agent, etcd and the kernel are real; only a second machine is not needed.
`meshnet.lab.topology` has the `Lab`.  Nothing is imported here, so that ``meshnet lab exec`` starts
fast.
"""
