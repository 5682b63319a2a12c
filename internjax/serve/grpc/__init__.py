"""The engine over gRPC: the Open Inference Protocol v2, and the same for a Triton server."""
