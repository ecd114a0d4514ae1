"""What changes the numbers that a network computes with: once, after the exact passes."""
