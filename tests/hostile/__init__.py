"""Hostile input: campaigns that try made-up and damaged input on every door of meshnet.

``make fuzz`` runs them for minutes; `test_campaigns` a deterministic slice of each, and every input
of ``corpus/``, which once found something or is like one that did.  See docs/hostile-input.md.
"""
