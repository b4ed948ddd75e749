"""Makes the op's tables for Python, C++ and the documentation from `plugins/sparse_ffn.yaml`.

`python -m plugins.contract` (`make contract`) writes them, `python -m plugins.contract --check` (`make lint`) finds those that
are behind. Data flows one way: `read` makes a `Contract`, each `*_text` module a text of it, `__main__` writes files.
"""
