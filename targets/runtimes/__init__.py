"""Runtimes: what turns an ONNX file into something that runs, one file each."""
