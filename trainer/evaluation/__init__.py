"""What a trained model is measured by: accuracy, classes, and what its routers and experts do."""
