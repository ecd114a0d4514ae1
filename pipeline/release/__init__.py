"""What ships: bundle and manifest."""
