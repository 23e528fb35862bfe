"""Images with boxes: what phase detect reads."""
