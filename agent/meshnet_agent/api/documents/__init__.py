"""The JSON documents of the API, one file a kind of object: a contract with scripts (docs/cli.md).

Values that functions build from values of the domain; nothing but the API makes or reads them.
Fields may be added, not renamed; their order is the order in JSON.
"""
