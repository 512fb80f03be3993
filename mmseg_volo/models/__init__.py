"""Networks: the VOLO backbone, heads and losses, segmentors, streaming prediction."""
