"""What an export writes: the manifest, the report, the model card, and the folder as a whole."""
