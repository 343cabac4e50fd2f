"""Wires: each moves bytes between a server and its sites, and knows nothing of what they say."""
