"""Where this project reaches into private parts of other libraries, or changes them for as long as it calls them.

One module for each; `registry.PATCHES` lists them with why they are and when they can go. Nothing else touches such parts.
"""
