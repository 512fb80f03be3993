"""Export a trained model to ONNX or torch.export files that run without this package, and check the files."""
