"""What experts are made of: copies of a dense model's layers, clusters of their inputs, modules taught apart."""
