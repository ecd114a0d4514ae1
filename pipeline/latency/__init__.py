"""What each width costs on the device, and the choice of widths that keeps the budget."""
