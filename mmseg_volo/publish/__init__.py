"""Publish a trained checkpoint as a folder of weights, config, model card and metafile, and on the Hugging Face hub."""
