"""Import annotations in the formats of labelling tools as index PNGs."""
