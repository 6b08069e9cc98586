"""HTTP dialects: one file each. A dialect parses a body, builds a ValidRequest, renders what the engine streams."""
