"""Where a network runs: devices, runtimes and the measuring harness. Imports profiles only, never torch."""
