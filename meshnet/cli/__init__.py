"""The client: one file a command group; calls the agent's API, nothing else.

It must start fast (the whole ``meshnet attach`` has 80 ms), so modules here import only the
standard library and `meshnet.errors` at the top.
"""
