"""From files to token trees: canonical rows, readers, formats, chat template, splits, batches and the embedded
world."""
