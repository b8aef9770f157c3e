"""The control plane: recipe, plan, forecast, job. Nothing here imports torch."""
