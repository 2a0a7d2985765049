"""The engine in Python; the one in C is `meshnet.vtep.native`."""
