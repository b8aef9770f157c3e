"""The worker plane: what a rank runs. It reads plan.json and never the recipe file."""
