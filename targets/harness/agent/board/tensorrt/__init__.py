"""What runs beside the agent on a board with TensorRT: builds engines, runs them, and drives trtexec."""
