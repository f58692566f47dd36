"""What several tests share: tiny families, made-up runs, warm engines, a browser."""
