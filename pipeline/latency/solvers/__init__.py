"""Ways of choosing widths under a budget, one solver per file."""
