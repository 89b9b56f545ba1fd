"""Keys and values of all tokens, kept over steps."""
