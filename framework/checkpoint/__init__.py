"""Saving, resuming and exporting: what a run leaves on the disk, complete or not at all."""
