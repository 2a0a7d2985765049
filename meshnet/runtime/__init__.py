"""The local runtime: images (docs/images.md).

An edge like `meshnet.store` and `meshnet.kernel`: imports the pure core and no other edge.  `oci`
is pure itself.
"""
