"""The web interface: what is watched, what was found, and what people decide of it (docs/dashboard.md)."""
