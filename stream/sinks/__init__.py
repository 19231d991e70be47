"""Sinks: alerts from the log to whoever must know, each sink by itself (DESIGN 3.6)."""
