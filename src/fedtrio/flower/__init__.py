"""Flower as an engine: the app for one's configuration (`app`), and what runs inside its ServerApp (`server`)."""
