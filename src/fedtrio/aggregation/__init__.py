"""Aggregation rules: pure functions from what sites sent to what the server keeps."""
