"""Live media in, alerts out: knows nothing of neural networks."""
