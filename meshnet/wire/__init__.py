"""What goes over the wire: header sizes and addresses computed from addresses.

Pure: imports no socket, file, clock or trio, and nothing of meshnet but `model`.
"""
