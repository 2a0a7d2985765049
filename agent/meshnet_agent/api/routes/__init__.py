"""The API's requests, one file per kind of object."""
