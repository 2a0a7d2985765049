"""The Debian package, in a Debian of its own (`make test-deb`)."""
