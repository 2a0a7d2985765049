"""The JSON documents of the API, one file per kind of object: a contract with scripts.

Functions build them from values of the domain, and only the API makes or reads them.  Fields may be
added but not renamed; their order is the order in JSON (docs/cli.md).
"""
