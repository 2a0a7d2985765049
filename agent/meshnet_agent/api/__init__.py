"""The API: HTTP and JSON on a Unix socket (docs/api.md).  Nothing else knows its documents."""
