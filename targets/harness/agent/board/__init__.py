"""The agent's parts: standard library and each other; what a runtime needs is imported when it is used."""
