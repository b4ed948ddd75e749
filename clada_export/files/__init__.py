"""Reading and writing files that strangers made: JSON, stamps and hashes, work folders, tokenizers."""
