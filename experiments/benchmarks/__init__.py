"""Side-by-side speed and memory of this library and what it is compared with."""
