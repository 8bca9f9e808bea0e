"""Trains any published variant on an ImageNet-style folder tree with the released augmentation.

    accelerate launch recipes/imagenet.py data.root=DIR [config=imagenet_8_512] [key=value ...]

DIR holds train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg. `data.name=hfds/NAME` and `data.name=wds/NAME` read
Hugging Face and WebDataset data. Continue a stopped run with the same command.
"""

from common.command_line import main

if __name__ == "__main__":
    main("imagenet_8_384")
