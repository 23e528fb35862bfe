"""Pictures as a model sees them: decoded, brought to RGB, resized, cut and normalised; for runs and strangers alike."""
