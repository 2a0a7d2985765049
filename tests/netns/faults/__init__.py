"""Faults: a mesh under traffic, what breaks it, and what must hold all the same.

`mesh` is the mesh under test, `traffic` what runs across it, `invariants` what is compared,
`fault` and the modules beside it what can go wrong, `sequence` many faults one after another.
"""
