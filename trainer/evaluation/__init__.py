"""What a trained model is measured by: accuracy, classes or features, and what its routers and experts do."""
