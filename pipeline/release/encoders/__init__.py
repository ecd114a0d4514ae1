"""Ways of writing weights into a bundle, one per file."""
