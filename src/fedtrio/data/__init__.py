"""From files to batches: `load` reads a corpus, `partition` deals it to sites, `batches` makes tensors."""
