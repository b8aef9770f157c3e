"""What weights and adapters look like: statistics of matrices, over the layers of a model."""
