"""The client: one file for each command group.  It calls the agent's API and nothing else.

It must start fast (``meshnet attach`` may take 80 ms in all), so modules here import only the
standard library and `meshnet.errors` at the top.
"""
