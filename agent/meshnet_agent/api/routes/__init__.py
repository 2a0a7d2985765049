"""The API's requests, one file a kind of object."""
