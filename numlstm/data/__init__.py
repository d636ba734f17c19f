"""Data on its way into a model: `batches` for `fit`, `text`, `tables` and `series` for files, `plots` for people."""
