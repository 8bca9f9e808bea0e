"""Trains a small Spike-Driven Transformer on scikit-learn's digits: nothing to download, minutes on two CPU cores.

    accelerate launch recipes/digits.py [key=value ...]

It is the image recipe with another configuration: recipes/configs/digits.yaml.
"""

from common.command_line import main

if __name__ == "__main__":
    main("digits")
