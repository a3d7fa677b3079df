"""From any source of rows to the batches a model takes: sources, columns, splits, transforms, sampling, collate."""
