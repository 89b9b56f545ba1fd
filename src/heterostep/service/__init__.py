"""Videos over HTTP, by an API like OpenAI's, on the workers of a batch."""
