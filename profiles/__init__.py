"""What is asked: the data that describes a device and a budget, and its types. Imports nothing else of this project."""
