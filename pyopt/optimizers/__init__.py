"""The catalogue; each file is one declaration, and pyopt/__init__.py names them all."""
