"""What a study shows and writes: tables, pictures, JSON."""
