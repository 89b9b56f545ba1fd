"""Row moves between all tokens and the active ones."""

from heterostep.kernels.reference import gather_rows, write_rows

__all__ = ["gather_rows", "write_rows"]
