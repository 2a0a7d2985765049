"""Brings the kernel to the state that the mesh and this host ask for, and keeps it there."""
