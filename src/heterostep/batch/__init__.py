"""Many videos from a file of lines: read, made by several workers, taken up again where it was interrupted."""
