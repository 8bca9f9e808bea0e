"""Trains on DVS128 Gesture, from the event files or the frames of a local folder.

    accelerate launch recipes/gesture.py data.root=DIR [config=gesture_t10] [key=value ...]

DIR holds ibmGestureTrain and ibmGestureTest, or DVSGesture with both in it, as Tonic lays them out, or else
SpikingJelly's events_np or frames_number_16_split_by_number.
"""

from common.command_line import main

if __name__ == "__main__":
    main("gesture_t16")
