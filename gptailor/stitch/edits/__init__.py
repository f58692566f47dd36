"""What may be done to a stitched model's weights, one file an edit. Each turns an `EditCase` into layers."""
