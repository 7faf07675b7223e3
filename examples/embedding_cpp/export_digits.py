"""Write the handwritten digits of scikit-learn for train_digits.cpp: `python export_digits.py digits.bin`."""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(path: str) -> None:
    """Counts of both parts, then for each its images, float32 and centred, and its labels."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype(np.float32), y, random_state=0, stratify=y)
    mean = x_train.mean(axis=0)
    with open(path, "wb") as file:
        file.write(np.array([len(x_train), len(x_test)], np.int32).tobytes())
        for images, labels in ((x_train, y_train), (x_test, y_test)):
            file.write((images - mean).astype(np.float32).tobytes() + labels.astype(np.int32).tobytes())
    print(f"{path}: {Path(path).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits.bin")
