"""Drivers: for each table of the kernel one thing that dumps and writes it."""
