"""The measuring agent: what Python runs on a device, as this folder or as one zip of it (`targets/harness/pack.py`)."""
