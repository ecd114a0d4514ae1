"""The nightly check: pinned baselines, history, the ledger of false alarms, change points."""
