"""Hosts as network namespaces on one machine: ``meshnet lab`` and the tests' fixture.

The real agent, the real etcd and the real kernel, without a second machine.  `meshnet.lab.topology`
has the `Lab`; nothing is imported here, so that ``meshnet lab exec`` starts fast.
"""
