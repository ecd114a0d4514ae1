"""What ranks the units inside a group, one criterion per file."""
