"""The image store: archives taken in, layers unpacked, names, and what containers hold."""
