"""What a container is to be, as values and as an OCI configuration (config.json).

Pure: imports no socket, file, clock or trio.
"""
