"""The way to the hub: what is pushed, retried, and told about it."""
