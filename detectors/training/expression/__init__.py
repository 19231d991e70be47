"""Training of the networks that say which expression a face shows, also half of one (docs/expression.md)."""
