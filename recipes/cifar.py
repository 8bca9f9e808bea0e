"""Trains on CIFAR-10 or CIFAR-100, from torchvision's layout in a local folder.

    accelerate launch recipes/cifar.py data.root=DIR [data.name=cifar100] [config=cifar10_2_512_tet] [key=value ...]

DIR holds cifar-10-batches-py or cifar-100-python; `data.download=true` fetches it.
"""

from common.command_line import main

if __name__ == "__main__":
    main("cifar10_2_256")
