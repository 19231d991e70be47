"""A network in, the fastest correct callable on this hardware out."""
