"""The target stage: graph and plan in, the files of one runtime out."""
