"""Before anything trains: whether it can work, and what it will cost."""
