"""Recordings in the true on-disk formats of the event data sets, and images from real photographs."""

import dv_processing
import numpy as np
import torch

GESTURES = 11
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def draw(number, width=128, height=128, seed=0):
    """Columns t (us), x, y, p of a recording, sorted by time."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(1, 1_000_000, number))
    return t, rng.integers(0, width, number), rng.integers(0, height, number), rng.integers(0, 2, number)


class Writer:
    """Writes recordings and whole data sets; every method returns what it wrote."""

    CIFAR10 = CIFAR10

    def aedat4(self, path, number=300, width=128, height=128, seed=0):
        columns = draw(number, width, height, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = dv_processing.io.MonoCameraWriter.EventOnlyConfig("DVXplorer_sample", (width, height))
        writer = dv_processing.io.MonoCameraWriter(str(path), config)
        for start in range(0, number, 1000):
            store = dv_processing.EventStore()
            for t, x, y, p in zip(*(column[start : start + 1000].tolist() for column in columns), strict=True):
                store.push_back(t, x, y, bool(p))
            writer.writeEvents(store)
        del writer
        return columns

    def gesture(self, path, number=300, seed=0, dtype=np.int64):
        t, x, y, p = draw(number, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([x, y, p, t // 1000], 1).astype(dtype))
        return t // 1000 * 1000, x, y, p

    def npz(self, path, number=300, seed=0, **columns):
        t, x, y, p = draw(number, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **(columns or {"t": t, "x": x, "y": y, "p": p}))
        return t, x, y, p

    def frames(self, path, time_steps=4, size=128, seed=0):
        frames = np.random.default_rng(seed).poisson(0.3, (time_steps, 2, size, size)).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, frames=frames)
        return frames

    def pt(self, path, label, time_steps=4, seed=0):
        counts = np.random.default_rng(seed).poisson(0.3, (2, 128, 128, time_steps)).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((torch.from_numpy(counts), torch.tensor([label])), path)
        return counts

    def bin(self, path, number=200, seed=0):
        """N-MNIST: 5 bytes an event, x, y, then a bit of polarity and 23 bits of time."""
        t, x, y, p = draw(number, 34, 34, seed)
        t = t % 300_000
        t.sort()
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.stack([x, y, (p << 7) | (t >> 16), (t >> 8) & 255, t & 255], 1)
        path.write_bytes(rows.astype(np.uint8).tobytes())
        return t, x, y, p

    def cifar10_dvs(self, root, per_class=3, number=200):
        """Tonic's layout; {path: columns}."""
        written = {}
        for label, name in enumerate(CIFAR10):
            for sample in range(per_class):
                path = root / "CIFAR10DVS" / name / f"cifar10_{name}_{sample}.aedat4"
                written[path] = self.aedat4(path, number, seed=100 * label + sample)
        return written

    def gestures(self, root, train=("user01_led", "user10_lab", "user02_natural"), test=("user24_led",), **options):
        """Tonic's layout; {path: columns}."""
        written = {}
        for split, users in (("ibmGestureTrain", train), ("ibmGestureTest", test)):
            for number, user in enumerate(users):
                for label in range(GESTURES):
                    path = root / "DVSGesture" / split / user / f"{label}.npy"
                    written[path] = self.gesture(path, seed=100 * number + label, **options)
        return written
