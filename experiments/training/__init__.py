"""Training loops that can be interrupted, on top of the library's train step."""
