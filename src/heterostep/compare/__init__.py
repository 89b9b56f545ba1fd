"""The quality-runtime frontier: heterostep and what a user would pick instead, from the same noise, in one process."""
