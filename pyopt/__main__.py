"""`python -m pyopt`: show the configuration."""

from pyopt.config import show_config

show_config()
