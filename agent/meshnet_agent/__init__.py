"""The meshnet agent: one daemon a host."""
