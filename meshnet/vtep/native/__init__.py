"""The native engine: the data path in C, for who has a C compiler (docs/design/userspace-vtep.md).

``src`` is the C source, `library` builds and loads it, `engine` drives it.  ``python -m
meshnet.vtep.native`` builds it from an installed package; ``make native`` does that.
"""
