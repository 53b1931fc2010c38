"""What a person runs around the three jobs."""
