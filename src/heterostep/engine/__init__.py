"""One run: which calls the transformer gets, what is kept between them, and what is told of it."""
