"""The measuring harness: what runs on the device, how it is leased, and what a measurement is."""
