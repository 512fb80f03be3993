"""Check a data set before training: every file exists, is complete, and is labelled as the config says."""
