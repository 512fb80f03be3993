"""Check a data set before training: every file is there, whole, and labelled as the config says."""
