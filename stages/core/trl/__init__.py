"""What makes a stage of a TRL trainer: tokens as text, rows as datasets, rewards as functions, models, checkpoints."""
