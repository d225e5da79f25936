"""Training: recipes, the trainer, a tower from scratch, the fusion."""
