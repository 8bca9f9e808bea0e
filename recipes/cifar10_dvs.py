"""Trains on CIFAR10-DVS, from the event files or the frames of a local folder.

    accelerate launch recipes/cifar10_dvs.py data.root=DIR [config=cifar10_dvs_t16] [key=value ...]

DIR holds CIFAR10DVS/CLASS/*.aedat4 as Tonic lays them out, or SpikingJelly's events_np or
frames_number_10_split_by_number, or TET's train/N.pt and test/N.pt.
"""

from common.command_line import main

if __name__ == "__main__":
    main("cifar10_dvs_t10_tet")
