"""Faces in, logits out: knows nothing of streams or hardware."""
