"""What a training step may add to the loss, one hook per file."""
