"""ONNX: export of graphs as models of standard ops."""
