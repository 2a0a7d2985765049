"""Bringing the kernel to what the mesh and this host say, and keeping it so."""
