"""ONNX: export, narrowing, rewriting and checking."""
